"""The tensors of a GGUF file, in order, each with a way to its bytes when its turn comes.

Nothing is computed before, so a model never lies in memory twice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Float32
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from bitray.export.layout import PROJECTION_AXES, Axis
from bitray.export.packing import FILE_TYPES, Codes, FileType, pack, pack_floats
from bitray.export.plan import Plan, rope_of, short_name
from bitray.models.families import decoder_layers, expert_paths
from bitray.nn import BitLinear
from bitray.nn.moe import IdentityRouter, MixtureOfExperts
from bitray.settings import UserError

F32 = FILE_TYPES["f32"]
SUBLN_AXES: dict[str, Axis] = {"o": "attention", "down": "ffn"}


@dataclass(frozen=True)
class Entry:
    """One tensor: `shape` in NumPy order and its bytes; `sources` are the parameters it comes from.

    If it holds codes, `layers` are their BitLinears (one, or one an expert) and `projection` is
    their short name.
    """

    name: str
    shape: tuple[int, ...]
    kind: FileType
    data: Callable[[], np.ndarray]
    sources: tuple[str, ...] = ()
    layers: tuple[BitLinear, ...] = ()
    projection: str = ""


def quantized(layer: BitLinear) -> tuple[Codes, float]:
    """The codes and the scale that training uses, as NumPy."""
    codes, scale = layer.quantized()
    return codes.cpu().numpy(), float(scale)


def array(tensor: Float[Tensor, "*shape"]) -> Float32[np.ndarray, "*shape"]:
    """A parameter in fp32 NumPy."""
    return tensor.detach().float().cpu().numpy()


def entries(model: PreTrainedModel, plan: Plan) -> list[Entry]:
    """Every tensor of the file; a UserError if a parameter of the model has no place in it."""
    found = list(_Places(model, plan).all())
    placed = {source for entry in found for source in entry.sources}
    missing = [name for name, _ in model.named_parameters() if name not in placed]
    if missing:
        raise UserError(
            f"export: architecture '{plan.architecture.name}' has no tensor for {missing[0]}"
            f"{f' and {len(missing) - 1} more' if missing[1:] else ''}; fold it into the weights "
            "or export with format=huggingface"
        )
    return found


@dataclass(frozen=True)
class _Places:
    """Finds the place of each parameter. `source` is a module's path, `target` a tensor's name
    less `.weight`."""

    model: PreTrainedModel
    plan: Plan

    def all(self) -> Iterator[Entry]:
        for source, target in self.plan.family.model_tensors.items():
            if source == "lm_head" and self.model.config.tie_word_embeddings:
                continue
            if source.endswith("norm"):
                yield self.norm(target, source, "hidden")
            else:
                yield self.table(target, source)
        if rope_of(self.model.config)["rope_type"] == "llama3":
            yield _rope_factors(self.model)
        for index in range(len(decoder_layers(self.model))):
            yield from self.layer(index)

    def layer(self, index: int) -> Iterator[Entry]:
        family = self.plan.family
        path, block = f"{family.layers}.{index}", f"blk.{index}"
        if self.plan.experts:
            yield self.router(f"{block}.ffn_gate_inp", path)
        for name, tensor in family.layer_tensors.items():
            if name in family.projections:
                yield from self.projection(f"{block}.{tensor}", path, name)
            else:
                inside_head = name.endswith(("q_norm", "k_norm"))
                source = f"{path}.{name}"
                yield self.norm(f"{block}.{tensor}", source, None if inside_head else "hidden")
        if self.plan.subln:
            for name, tensor in family.subln_tensors.items():
                axis = SUBLN_AXES[short_name(name.removesuffix(".subln"))]
                yield self.norm(f"{block}.{tensor}", f"{path}.{name}", axis)

    def projection(self, target: str, path: str, name: str) -> Iterator[Entry]:
        """A projection of the layer at `path`; of experts all matrices, [experts, out, in]."""
        layer, layout = self.model.get_submodule(path), self.plan.layout
        modules = {
            f"{path}.{where}": layer.get_submodule(where) for where in expert_paths(layer, name)
        }
        rows, columns = PROJECTION_AXES[short_name(name)]
        shape: tuple[int, ...] = (layout.size(rows), layout.size(columns))
        if f"{path}.{name}" not in modules:
            target, shape = f"{target}_exps", (len(modules), *shape)
        ternary = {source: m for source, m in modules.items() if isinstance(m, BitLinear)}
        if ternary:
            yield from self.codes(target, ternary, shape)
        else:
            place = lambda weight: layout.place(weight, rows, columns)  # noqa: E731
            yield self.floats(target, list(modules), shape, place)
        for source, module in modules.items():
            if module.bias is not None:  # in experts the plan refuses it
                yield self.bias(target, source, rows)

    def bias(self, target: str, source: str, axis: Axis) -> Entry:
        bias, layout = self.model.get_parameter(f"{source}.bias"), self.plan.layout
        data = lambda: pack_floats(layout.place_vector(array(bias), axis), "f32")  # noqa: E731
        return Entry(f"{target}.bias", (layout.size(axis),), F32, data, (f"{source}.bias",))

    def codes(
        self, target: str, layers: Mapping[str, BitLinear], shape: tuple[int, ...]
    ) -> Iterator[Entry]:
        """Packed matrices one after the other, and their scales where those are apart."""
        name, plan, these = short_name(next(iter(layers))), self.plan, tuple(layers.values())

        def packed(layer: BitLinear) -> np.ndarray:
            codes, scale = quantized(layer)
            placed = plan.layout.place(codes, *PROJECTION_AXES[name])
            return pack(placed, 1.0 if plan.scale_tensors else scale, plan.kind)

        data = lambda: np.concatenate([packed(layer) for layer in these])  # noqa: E731
        sources = tuple(f"{source}.weight" for source in layers)
        yield Entry(f"{target}.weight", shape, plan.kind, data, sources, these, name)
        if plan.scale_tensors:
            yield Entry(f"{target}.scale", (len(these),), F32, lambda: _scales(these))

    def router(self, target: str, path: str) -> Entry:
        """What chooses the experts, in fp32. All alike, it does not matter which are chosen."""
        mixture, layout = self.model.get_submodule(f"{path}.mlp"), self.plan.layout
        assert isinstance(mixture, MixtureOfExperts)
        shape = (len(mixture.experts), layout.size("hidden"))
        if isinstance(mixture.router, IdentityRouter):
            if not _all_alike(mixture):
                raise UserError(
                    f"export: {path} sends every token to its first experts, which GGUF can say "
                    "only while all experts are alike; use router='top_k'"
                )
            zeros = np.zeros(shape, np.float32)
            return Entry(f"{target}.weight", shape, F32, lambda: pack_floats(zeros, "f32"))
        weight = mixture.router.weight
        data = lambda: pack_floats(layout.place(array(weight), None, "hidden"), "f32")  # noqa: E731
        return Entry(f"{target}.weight", shape, F32, data, (f"{path}.mlp.router.weight",))

    def table(self, target: str, source: str) -> Entry:
        """Token embeddings or output head: [vocabulary, hidden]."""
        layout = self.plan.layout
        rows = self.model.get_parameter(f"{source}.weight").shape[0]
        shape = (rows, layout.size("hidden"))
        place = lambda weight: layout.place(weight, None, "hidden")  # noqa: E731
        return self.floats(target, [source], shape, place)

    def floats(
        self,
        target: str,
        modules: Sequence[str],
        shape: tuple[int, ...],
        place: Callable[[np.ndarray], np.ndarray],
    ) -> Entry:
        """Matrices that are not ternary one after the other, in the file's float type."""
        sources = tuple(f"{source}.weight" for source in modules)
        weights, kind = [self.model.get_parameter(name) for name in sources], self.plan.kind.floats

        def data() -> np.ndarray:
            return np.concatenate([pack_floats(place(array(w)), kind) for w in weights])

        return Entry(f"{target}.weight", shape, FILE_TYPES[kind], data, sources)

    def norm(self, target: str, source: str, axis: Axis | None) -> Entry:
        """The weight of an RMSNorm, fp32 in every file; `axis=None` for norms inside a head."""
        weight, layout = self.model.get_parameter(f"{source}.weight"), self.plan.layout
        size = weight.numel() if axis is None else layout.size(axis)

        def data() -> np.ndarray:
            values = array(weight)
            return pack_floats(values if axis is None else layout.place_norm(values, axis), "f32")

        return Entry(f"{target}.weight", (size,), F32, data, (f"{source}.weight",))


def _scales(layers: Sequence[BitLinear]) -> np.ndarray:
    return pack_floats(np.array([quantized(layer)[1] for layer in layers], np.float32), "f32")


def _all_alike(mixture: MixtureOfExperts) -> bool:
    first, *others = [list(expert.parameters()) for expert in mixture.experts]
    return all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


def _rope_factors(model: PreTrainedModel) -> Entry:
    """Llama 3's stretched wavelengths, as the divisors of the plain frequencies."""
    config = model.config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    factors = array(1.0 / rope_of(config)["rope_theta"] ** steps / scaled)
    return Entry("rope_freqs.weight", factors.shape, F32, lambda: pack_floats(factors, "f32"))

"""The tensors of a GGUF file, in order, each with a way to its bytes when its turn comes.

Nothing is computed before, so a model never lies in memory twice.
"""

from collections.abc import Callable, Iterator
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
from bitray.models.families import decoder_layers
from bitray.nn import BitLinear
from bitray.settings import UserError

F32 = FILE_TYPES["f32"]
SUBLN_AXES: dict[str, Axis] = {"o": "attention", "down": "ffn"}


@dataclass(frozen=True)
class Entry:
    """One tensor: `shape` in NumPy order and its bytes; `source` is the parameter it comes from.

    If it holds codes, `layer` is their BitLinear and `projection` that one's short name.
    """

    name: str
    shape: tuple[int, ...]
    kind: FileType
    data: Callable[[], np.ndarray]
    source: str | None = None
    layer: BitLinear | None = None
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
    placed = {entry.source for entry in found}
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
            yield from self.layer(f"{self.plan.family.layers}.{index}", f"blk.{index}")

    def layer(self, path: str, block: str) -> Iterator[Entry]:
        family = self.plan.family
        for name, tensor in family.layer_tensors.items():
            source, target = f"{path}.{name}", f"{block}.{tensor}"
            if name in family.projections:
                yield from self.projection(target, source)
            else:
                inside_head = name.endswith(("q_norm", "k_norm"))
                yield self.norm(target, source, None if inside_head else "hidden")
        if self.plan.subln:
            for name, tensor in family.subln_tensors.items():
                axis = SUBLN_AXES[short_name(name.removesuffix(".subln"))]
                yield self.norm(f"{block}.{tensor}", f"{path}.{name}", axis)

    def projection(self, target: str, source: str) -> Iterator[Entry]:
        module, layout = self.model.get_submodule(source), self.plan.layout
        rows, columns = PROJECTION_AXES[short_name(source)]
        shape = (layout.size(rows), layout.size(columns))
        if isinstance(module, BitLinear):
            yield self.codes(target, source, module, shape)
            if self.plan.scale_tensors:
                yield Entry(f"{target}.scale", (1,), F32, lambda: _scale(module))
        else:
            yield self.floats(
                target, source, shape, lambda weight: layout.place(weight, rows, columns)
            )
        if module.bias is not None:
            bias = module.get_parameter("bias")
            placed = lambda: pack_floats(layout.place_vector(array(bias), rows), "f32")  # noqa: E731
            yield Entry(f"{target}.bias", shape[:1], F32, placed, f"{source}.bias")

    def codes(self, target: str, source: str, layer: BitLinear, shape: tuple[int, int]) -> Entry:
        name, plan = short_name(source), self.plan

        def data() -> np.ndarray:
            codes, scale = quantized(layer)
            placed = plan.layout.place(codes, *PROJECTION_AXES[name])
            return pack(placed, 1.0 if plan.scale_tensors else scale, plan.kind)

        return Entry(f"{target}.weight", shape, plan.kind, data, f"{source}.weight", layer, name)

    def table(self, target: str, source: str) -> Entry:
        """Token embeddings or output head: [vocabulary, hidden]."""
        layout = self.plan.layout
        rows = self.model.get_parameter(f"{source}.weight").shape[0]
        shape = (rows, layout.size("hidden"))
        return self.floats(
            target, source, shape, lambda weight: layout.place(weight, None, "hidden")
        )

    def floats(
        self,
        target: str,
        source: str,
        shape: tuple[int, int],
        place: Callable[[np.ndarray], np.ndarray],
    ) -> Entry:
        """A matrix that is not ternary, in the file's float type."""
        weight, kind = self.model.get_parameter(f"{source}.weight"), self.plan.kind.floats
        data = lambda: pack_floats(place(array(weight)), kind)  # noqa: E731
        return Entry(f"{target}.weight", shape, FILE_TYPES[kind], data, f"{source}.weight")

    def norm(self, target: str, source: str, axis: Axis | None) -> Entry:
        """The weight of an RMSNorm, fp32 in every file; `axis=None` for norms inside a head."""
        weight, layout = self.model.get_parameter(f"{source}.weight"), self.plan.layout
        size = weight.numel() if axis is None else layout.size(axis)

        def data() -> np.ndarray:
            values = array(weight)
            return pack_floats(values if axis is None else layout.place_norm(values, axis), "f32")

        return Entry(f"{target}.weight", (size,), F32, data, f"{source}.weight")


def _scale(layer: BitLinear) -> np.ndarray:
    return pack_floats(np.array([quantized(layer)[1]], np.float32), "f32")


def _rope_factors(model: PreTrainedModel) -> Entry:
    """Llama 3's stretched wavelengths, as the divisors of the plain frequencies."""
    config = model.config
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    steps = torch.arange(0, 2 * len(scaled), 2, dtype=torch.float32) / (2 * len(scaled))
    factors = array(1.0 / rope_of(config)["rope_theta"] ** steps / scaled)
    return Entry("rope_freqs.weight", factors.shape, F32, lambda: pack_floats(factors, "f32"))

"""Writes folders that stock transformers loads with `AutoModelForCausalLM`, without our code.

Llama with SubLN as in the paper is `BitNetForCausalLM`. Every other model keeps its own class,
whose linear layers transformers' BitNet quantiser replaces while it loads.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import safe_open
from torch import Tensor
from transformers import BitNetConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from bitray.export.card import ModelCard
from bitray.export.packing import pack_rows, unpack_rows
from bitray.export.plan import check_ternary, dims_of, subln_of
from bitray.export.publish import published_folder
from bitray.export.report import Checked, ExportError, Report
from bitray.models.families import decoder_layers, family_of, norm_eps
from bitray.models.moe import experts_of
from bitray.nn import BitLinear
from bitray.settings import UserError, nearest

MODES = ("offline", "online")

INERT = 2.0**-8
"""How small the layer norms' output is against sqrt(eps); see `_norms_moved_inside`."""


def write_huggingface(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: str | os.PathLike[str],
    card: ModelCard | Mapping[str, Any] | None = None,
    mode: str = "offline",
) -> Report:
    """Write a model folder to `directory` (local, s3://, gs://): weights, config, tokenizer, card.

    `offline` packs four codes a byte with their fp32 scale. `online` keeps the fp32 masters, which
    transformers quantises in each forward, so that the model can be trained on. The weights are
    read back and compared before the folder gets its name (`ExportError` otherwise).

    Raises `UserError` with the reason when the model has no such form.
    """
    check_ternary(model)
    if mode not in MODES:
        raise UserError(f"mode={mode}: choose one of {', '.join(MODES)}{nearest(mode, MODES)}")
    card = card if isinstance(card, ModelCard) else ModelCard(**(card or {}))
    form = form_of(model)
    tensors = dict(_tensors(model, form, mode))
    with published_folder(os.fspath(directory), marker="config.json") as folder:
        config = _config(model, form, mode)
        config.save_pretrained(folder)
        save_torch_state_dict(tensors, folder)
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors makes them private, unlike everything beside them
        tokenizer.save_pretrained(folder)
        _save_generation_config(model, folder)
        (folder / "README.md").write_text(card.markdown(_usage(mode)), encoding="utf-8")
        checked = _check(model, folder, mode)
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    return Report(
        path=os.fspath(directory),
        type=f"huggingface ({mode})",
        architecture=_architecture(model, form),
        bytes=size,
        ternary_tensors=checked.tensors,
        ternary_weights=checked.weights,
        zeros=checked.zeros / checked.weights,
        mismatches=checked.mismatches,
    )


# -------------------------------------------------------------------------------------- the form

Form = Literal["bitnet", "plain", "norm_inside", "norm_everywhere"]


def form_of(model: PreTrainedModel) -> Form:
    """Which of the shapes that transformers knows holds the model.

    `bitnet`: BitNetForCausalLM. The others are the model's own class: `plain` without SubLN, with
    an RMSNorm in every quantised layer (transformers has it in all or in none) otherwise. Raises
    UserError where none does.
    """
    if experts_of(model.config):
        raise UserError(
            "export: transformers has no ternary class with these experts; export with format=gguf"
        )
    subln = subln_of(model)
    if subln == "none":
        return "plain"
    if subln == "all":
        return "norm_everywhere"
    dims, config = dims_of(model.config), model.config
    fits = config.model_type == "llama" and dims.attention == dims.hidden and not config.mlp_bias
    return "bitnet" if fits else "norm_inside"


def _architecture(model: PreTrainedModel, form: Form) -> str:
    return "BitNetForCausalLM" if form == "bitnet" else type(model).__name__


def _config(model: PreTrainedModel, form: Form, mode: str) -> PretrainedConfig:
    values = model.config.to_dict()
    for ours in ("bitray", "_name_or_path", "transformers_version", "architectures", "dtype"):
        values.pop(ours, None)
    if form == "bitnet":
        for theirs in ("model_type", "mlp_bias", "head_dim", "pretraining_tp"):
            values.pop(theirs, None)
        config: PretrainedConfig = BitNetConfig(**values)
    else:
        config = type(model.config)(**values)
    config.architectures = [_architecture(model, form)]
    config.dtype = "float32"  # a scale rounded to bf16 would be off by up to 0.4 %
    config.quantization_config = {
        "quant_method": "bitnet",
        "linear_class": "autobitlinear",
        "quantization_mode": mode,
        "modules_to_not_convert": ["lm_head"],
        "use_rms_norm": form in ("norm_inside", "norm_everywhere"),
        "rms_norm_eps": norm_eps(model.config),
    }
    return config


# ----------------------------------------------------------------------------------- the tensors


def _tensors(model: PreTrainedModel, form: Form, mode: str) -> Iterator[tuple[str, Tensor]]:
    layers = {
        name: module for name, module in model.named_modules() if isinstance(module, BitLinear)
    }
    inside = {f"{name}.{part}" for name, layer in layers.items() for part in _parts(name, layer)}
    gains = dict(_gains(model, form, layers))
    for name, layer in layers.items():
        yield from _projection(name, layer, mode)
    for name, parameter in model.named_parameters():
        if name not in inside and name not in gains:
            yield name, parameter.detach().float()
    yield from gains.items()


def _parts(path: str, layer: BitLinear) -> list[str]:
    """The parameters of a layer, all of which have a place in the file."""
    parts = [name for name, _ in layer.named_parameters()]
    strangers = [name for name in parts if name not in ("weight", "bias", "subln.weight")]
    if strangers:
        raise UserError(
            f"export: transformers' BitNet layers have no place for {path}.{strangers[0]}; "
            "fold it into the weights first"
        )
    return parts


def _projection(name: str, layer: BitLinear, mode: str) -> Iterator[tuple[str, Tensor]]:
    bias = None if layer.bias is None else layer.bias.detach().float()
    if mode == "online":
        yield f"{name}.weight", layer.weight.detach()
    else:
        codes, scale = layer.quantized()
        if codes.shape[0] % 4:
            raise UserError(
                f"export: {name} has {codes.shape[0]} outputs; transformers packs rows by four, so "
                "export with mode=online"
            )
        yield f"{name}.weight", torch.from_numpy(pack_rows(codes.cpu().numpy()))
        yield f"{name}.weight_scale", scale.reshape(1)
        # transformers multiplies the sum of product and bias by the scale
        bias = None if bias is None else bias / scale
    if bias is not None:
        yield f"{name}.bias", bias


def _gains(
    model: PreTrainedModel, form: Form, layers: Mapping[str, BitLinear]
) -> Iterator[tuple[str, Tensor]]:
    """Gains of SubLN, and what becomes of the layer norms, under the names of the form."""
    names = {"o_proj": "attn_sub_norm", "down_proj": "ffn_sub_norm"}
    for name, layer in layers.items():
        if layer.subln is None:
            continue
        parent, _, child = name.rpartition(".")
        target = f"{parent}.{names[child]}" if form == "bitnet" else f"{name}.rms_norm"
        yield f"{target}.weight", layer.subln.weight.detach().float()
    if form == "norm_inside":
        yield from _norms_moved_inside(model)


def _norms_moved_inside(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """The layer norms' gains, moved into the projections that read them; the norms become inert.

    Two RMSNorms in a row are not one: with gain c and 1 and the same eps they give
    `x c / sqrt((c^2 + eps) mean(x^2) + eps^2)`, so a first norm of gain 1 undoes the eps, which is
    0.2 % where embeddings are small. With c^2 << eps this is `x c / sqrt(eps)` over
    `sqrt(mean(x^2) + eps)`: the first norm does the work and the second one only divides by
    sqrt(eps + c^2), which its gain takes back. bfloat16 holds these numbers, float16 does not.
    """
    eps = norm_eps(model.config)
    small = INERT * math.sqrt(eps)
    restore = math.sqrt(eps + small**2) / small
    family = family_of(model)
    readers = {
        "input_layernorm": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
        "post_attention_layernorm": ("mlp.gate_proj", "mlp.up_proj"),
    }
    for index, layer in enumerate(decoder_layers(model)):
        for norm, projections in readers.items():
            gain = layer.get_parameter(f"{norm}.weight").detach().float()
            yield f"{family.layers}.{index}.{norm}.weight", torch.full_like(gain, small)
            for projection in projections:
                yield f"{family.layers}.{index}.{projection}.rms_norm.weight", gain * restore


# ------------------------------------------------------------------------------- everything else


def _save_generation_config(model: PreTrainedModel, folder: Path) -> None:
    generation = model.generation_config
    if generation is not None:
        generation.save_pretrained(folder)


def _usage(mode: str) -> str:
    kept = "packed codes" if mode == "offline" else "fp32 masters, quantised in each forward"
    return (
        "```python\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")\n'
        'tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")\n'
        "```\n\n"
        f"Needs `accelerate`. The weights are {kept}; load in float32 or bfloat16. transformers "
        "compiles the unpacking when it is first used: without a C++ compiler set "
        "`TORCHDYNAMO_DISABLE=1`."
    )


def _check(model: PreTrainedModel, folder: Path, mode: str) -> Checked:
    """Read the weights back: every code and scale (or master) equal to the bit.

    Of masters also count the codes that transformers' own formula, with its fp32 mean and product
    instead of a division, will round to the other side.
    """
    tensors = weights = zeros = mismatches = 0
    stored = _stored(folder)
    for name, layer in model.named_modules():
        if not isinstance(layer, BitLinear):
            continue
        codes, scale = layer.quantized()
        found = stored[f"{name}.weight"].get_tensor(f"{name}.weight")
        if mode == "online":
            same = torch.equal(found, layer.weight.detach().cpu())
            mismatches += int((_their_codes(found) != codes.cpu()).sum())
        else:
            found_scale = stored[f"{name}.weight_scale"].get_tensor(f"{name}.weight_scale")
            same = np.array_equal(unpack_rows(found.numpy()), codes.cpu().numpy())
            same = same and torch.equal(found_scale, scale.reshape(1).cpu())
        if not same:
            raise ExportError(f"{folder}: {name} is not what training uses")
        tensors, weights = tensors + 1, weights + codes.numel()
        zeros += int((codes == 0).sum())
    return Checked(tensors, weights, zeros, mismatches)


def _their_codes(master: Tensor) -> Tensor:
    return (master * (1.0 / master.abs().mean().clamp_(min=1e-5))).round().clamp(-1, 1)


def _stored(folder: Path) -> dict[str, Any]:
    """An open safetensors file for each tensor in the folder."""
    files = [safe_open(path, framework="pt") for path in sorted(folder.glob("*.safetensors"))]
    return {name: file for file in files for name in file.keys()}  # noqa: SIM118

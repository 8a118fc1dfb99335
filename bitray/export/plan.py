"""What a GGUF file of a model would be, or why it cannot be: from modules and config alone.

`plan` reads no weight, so the question can be put before a model is trained.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from bitray.export.layout import Dims, Layout, Rules, pad
from bitray.export.packing import FileType, file_type
from bitray.models.families import (
    Family,
    decoder_layers,
    expert_paths,
    family_of,
    norm_eps,
)
from bitray.models.moe import Experts, experts_of
from bitray.nn import BitLinear, bit_linears
from bitray.settings import UserError


@dataclass(frozen=True)
class Architecture:
    """What llama.cpp's graph of one `general.architecture` can express.

    `square`: the output projection is [hidden, hidden]. `biases`: projections that may have one.
    `untied`: whether it reads a separate output head. `rope_factors`: whether it reads
    `rope_freqs.weight`. `rotary_pairs`: whether its rotary embedding turns neighbours, so that rows
    of q and k have to be interleaved. `tensor_scales`: whether it multiplies *every* projection by
    its `.scale` tensor. qwen2 does so for attention only and would silently compute garbage in its
    MLP (tried with llama-cpp-python 0.3.36), so there the scale has to lie in the blocks, in f16.
    """

    name: str
    square: bool = False
    biases: frozenset[str] = frozenset()
    untied: bool = True
    rope_factors: bool = False
    rotary_pairs: bool = False
    tensor_scales: bool = True


ARCHITECTURES = {
    architecture.name: architecture
    for architecture in (
        Architecture("llama", biases=frozenset({"q", "k", "v", "o", "gate", "up", "down"}),
                     rope_factors=True, rotary_pairs=True),
        Architecture("bitnet", square=True, untied=False),
        Architecture("qwen2", square=True, biases=frozenset({"q", "k", "v"}), tensor_scales=False),
        Architecture("qwen3"),
    )
}  # fmt: skip
WITH_EXPERTS = {
    "llama": replace(ARCHITECTURES["llama"], biases=frozenset({"q", "k", "v", "o"})),
    "qwen3moe": replace(ARCHITECTURES["qwen3"], name="qwen3moe"),
}
"""Those that route tokens to the k likeliest experts with weights that sum to 1."""


@dataclass(frozen=True)
class Plan:
    """A file that can be written: its type, architecture, and the layout of its weights."""

    kind: FileType
    architecture: Architecture
    family: Family
    layout: Layout
    subln: bool
    experts: Experts | None
    scale_tensors: bool
    """Whether fp32 scales lie in tensors of their own, with block scales of 1."""


def short_name(path: str) -> str:
    """`self_attn.q_proj` -> `q`: the projection in one word."""
    return path.rsplit(".", 1)[-1].removesuffix("_proj")


def projections(layer: nn.Module, family: Family) -> dict[str, nn.Linear | BitLinear]:
    """The projections of a decoder layer by their short names; of experts, those of the first."""
    paths = [expert_paths(layer, path)[0] for path in family.projections]
    return {short_name(path): layer.get_submodule(path) for path in paths}


def subln_of(model: nn.Module) -> str:
    """`none`, `paper` or `all`: where the model has SubLN. Another placement is a UserError."""
    family = family_of(model)
    found = {
        name
        for layer in decoder_layers(model)
        for name, module in projections(layer, family).items()
        if isinstance(module, BitLinear) and module.subln is not None
    }
    placements = {
        "none": set(),
        "paper": {short_name(path) for path in family.paper_subln},
        "all": {short_name(path) for path in family.projections},
    }
    for placement, names in placements.items():
        if found == names:
            return placement
    raise UserError(f"export: SubLN before {', '.join(sorted(found))} only has no known form")


def dims_of(config: PretrainedConfig) -> Dims:
    """The widths, from the config."""
    heads = config.num_attention_heads
    return Dims(
        hidden=config.hidden_size,
        heads=heads,
        kv_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        ffn=config.intermediate_size,
    )


def rope_of(config: PretrainedConfig) -> Mapping[str, Any]:
    """`rope_type`, `rope_theta` and what else the rotary embedding is made from."""
    return {"rope_type": "default", "rope_theta": 10000.0, **(config.rope_parameters or {})}


def check_ternary(model: nn.Module) -> None:
    """UserError unless the model is ternary and at full strength, as every export needs it."""
    layers = bit_linears(model)
    if not layers:
        raise UserError("export: the model has no ternary layer; convert it with to_bitnet first")
    if any(layer.correction is not None for layer in layers):
        raise UserError(
            "export: the model has low-rank corrections, which neither llama.cpp nor transformers "
            "computes beside ternary weights; export the checkpoint of the stage before lrc"
        )
    lowest = min(float(layer.strength) for layer in layers)
    if lowest < 1:
        raise UserError(
            f"export: quantisation strength is {lowest:g}; only strength 1 has ternary weights, "
            "so train until the strength warm-up is over"
        )


def plan(model: PreTrainedModel, type: str, subln: str | None = None) -> Plan:
    """How `model` goes into a GGUF file of `type`; a UserError with the reason if it cannot.

    `subln` asks about a conversion still to come; by default it is read off the model.
    """
    kind, family = file_type(type), family_of(model)
    subln = subln_of(model) if subln is None else subln
    experts = experts_of(model.config)
    architecture = _architecture(family, subln, experts, kind)
    _check_expressible(model, architecture)
    return Plan(
        kind=kind,
        architecture=architecture,
        family=family,
        layout=_layout(model, kind, family, architecture, subln != "none"),
        subln=subln != "none",
        experts=experts,
        scale_tensors=_scale_tensors(model, kind, architecture),
    )


def _scale_tensors(model: PreTrainedModel, kind: FileType, architecture: Architecture) -> bool:
    """Tensors of scales are exact, but llama.cpp applies those of the MLP after its biases."""
    exact = architecture.tensor_scales and not _biased(model) & {"gate", "up", "down"}
    return kind.name in ("tq1_0", "tq2_0") and exact


def can_export(
    model_or_config: PreTrainedModel | PretrainedConfig, type: str, subln: str | None = None
) -> str | None:
    """Why a model cannot become a GGUF file of `type`, in a sentence; None if it can.

    For asking before training: strength is not looked at. With a config, or a model that is not
    converted yet, say which `subln` the conversion will use.
    """
    try:
        plan(_skeleton(model_or_config), type, subln)
    except UserError as error:
        return str(error)
    return None


def _skeleton(model_or_config: PreTrainedModel | PretrainedConfig) -> PreTrainedModel:
    if not isinstance(model_or_config, PretrainedConfig):
        return model_or_config
    family_of(model_or_config)
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_or_config)


def _architecture(
    family: Family, subln: str, experts: Experts | None, kind: FileType
) -> Architecture:
    if experts is not None:
        return _architecture_with_experts(family, subln, kind)
    if subln == "none":
        return ARCHITECTURES[family.gguf]
    if subln == "all":
        raise UserError(
            "export: no GGUF architecture has a SubLN before every projection; convert with "
            "subln='paper' or 'none', or export with format=huggingface"
        )
    if family.gguf_subln is None:
        raise UserError(
            f"export: llama.cpp has no architecture for {family.model_type} with SubLN; convert "
            "with subln='none', or export with format=huggingface"
        )
    return ARCHITECTURES[family.gguf_subln]


def _architecture_with_experts(family: Family, subln: str, kind: FileType) -> Architecture:
    if subln != "none":
        raise UserError(
            "export: no GGUF architecture has a SubLN inside its experts; convert with "
            "subln='none' before the MLPs become experts"
        )
    if kind.name == "i2_s":
        raise UserError(
            "export: i2_s holds one scale for a tensor, and a tensor of experts needs one for each "
            "of them; use type=tq2_0 or tq1_0"
        )
    assert family.gguf_moe is not None, family
    return WITH_EXPERTS[family.gguf_moe]


def _check_expressible(model: PreTrainedModel, architecture: Architecture) -> None:
    config, name = model.config, architecture.name
    rope = rope_of(config)
    reasons = {
        f"activation '{config.hidden_act}' (it computes silu)": config.hidden_act != "silu",
        "an output head of its own (it ties the head to the embeddings)": (
            not config.tie_word_embeddings and not architecture.untied
        ),
        "sliding-window attention": bool(getattr(config, "use_sliding_window", False)),
        f"rotary scaling '{rope['rope_type']}'": not _rope_fits(rope, architecture),
        "partial rotary embeddings": rope.get("partial_rotary_factor", 1.0) != 1.0,
        "biases there": bool(_biased(model) - architecture.biases),
    }
    for reason, applies in reasons.items():
        if applies:
            raise UserError(
                f"export: llama.cpp's architecture '{name}' cannot express {reason}; "
                "export with format=huggingface"
            )


def _rope_fits(rope: Mapping[str, Any], architecture: Architecture) -> bool:
    kind = rope["rope_type"]
    return kind in ("default", "linear") or (kind == "llama3" and architecture.rope_factors)


def _biased(model: PreTrainedModel) -> set[str]:
    family = family_of(model)
    return {
        name
        for layer in decoder_layers(model)
        for name, module in projections(layer, family).items()
        if module.bias is not None
    }


def _layout(
    model: PreTrainedModel, kind: FileType, family: Family, architecture: Architecture, subln: bool
) -> Layout:
    dims = dims_of(model.config)
    rules = Rules(
        block=kind.block,
        square=architecture.square,
        one_ratio=subln,
        fixed_hidden="self_attn.q_norm" in family.layer_tensors,
    )
    padded = pad(dims, rules)
    if padded is None:
        raise UserError(
            f"export: {_misfit(dims, kind, rules)} for architecture '{architecture.name}'"
        )
    return Layout(dims, padded, rotary_pairs=architecture.rotary_pairs)


def _misfit(dims: Dims, kind: FileType, rules: Rules) -> str:
    whys = {
        "its q/k norms share one eps with the others, so the hidden size cannot be padded": (
            rules.fixed_hidden
        ),
        "heads * head_dim and the hidden size must be equal": rules.square
        and dims.attention != dims.hidden,
        "all widths must grow by one ratio": rules.one_ratio,
    }
    why = next((reason for reason, applies in whys.items() if applies), "no padding fits")
    return f"{dims} does not fit {kind.name}'s blocks of {kind.block}: {why},"


def eps_of(model: PreTrainedModel, layout: Layout) -> float:
    """The file's one eps."""
    return layout.eps(norm_eps(model.config))

"""The model zoo as data: one constant for each family of decoders that bitray converts and exports.

Names of modules are those of transformers, names of tensors and architectures those of GGUF.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import nn
from transformers import PretrainedConfig

from bitray.settings import UserError, nearest

PROJECTIONS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
QKV = ("q_proj", "k_proj", "v_proj")
PAPER_SUBLN = ("self_attn.o_proj", "mlp.down_proj")
"""BitDistill (arXiv 2510.13998): before the output projections of attention and MLP."""

MODEL_TENSORS = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}
LAYER_TENSORS = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
QK_NORMS = {"self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm"}
BITNET_SUBLN = {
    "self_attn.o_proj.subln": "attn_sub_norm",
    "mlp.down_proj.subln": "ffn_sub_norm",
}


@dataclass(frozen=True)
class Family:
    """What bitray has to know of one Hugging Face architecture."""

    model_type: str
    """`config.model_type` of transformers."""
    gguf: str
    """GGUF architecture of a model without SubLN."""
    layers: str = "model.layers"
    """Path of the decoder layers inside the causal language model."""
    projections: tuple[str, ...] = PROJECTIONS
    """Paths inside a layer of the linear layers that become ternary."""
    paper_subln: tuple[str, ...] = PAPER_SUBLN
    """Those of them that get a SubLN with `subln="paper"`."""
    gguf_subln: str | None = None
    """GGUF architecture of a model with SubLN as in the paper; None where there is none."""
    gguf_moe: str | None = None
    """GGUF architecture of a model with experts and without SubLN; None where there is none."""
    model_tensors: Mapping[str, str] = field(default_factory=lambda: MODEL_TENSORS)
    """Module -> GGUF tensor, both less `.weight` / `.bias`."""
    layer_tensors: Mapping[str, str] = field(default_factory=lambda: LAYER_TENSORS)
    """Module inside layer N -> GGUF tensor less `blk.N.`."""
    subln_tensors: Mapping[str, str] = field(default_factory=lambda: BITNET_SUBLN)
    """SubLN inside layer N -> GGUF tensor less `blk.N.`, for `gguf_subln`."""


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(model_type="llama", gguf="llama", gguf_subln="bitnet", gguf_moe="llama"),
        # its own architecture of experts wants a shared one, and weights that do not sum to 1
        Family(model_type="qwen2", gguf="qwen2", gguf_moe="llama"),
        Family(
            model_type="qwen3",
            gguf="qwen3",
            gguf_moe="qwen3moe",
            layer_tensors={**LAYER_TENSORS, **QK_NORMS},
        ),
    )
}


def family_of(model: nn.Module | PretrainedConfig) -> Family:
    """The family of a model or of its config. `UserError` for one that bitray does not know."""
    config: Any = model if isinstance(model, PretrainedConfig) else model.config
    kind = config.model_type
    if kind not in FAMILIES:
        raise UserError(
            f"model_type '{kind}' is not supported{nearest(kind, FAMILIES)}{_fused(model)}; "
            f"supported are: {', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def _fused(model: nn.Module | PretrainedConfig) -> str:
    """` (...)` naming a module that holds several projections in one, if there is one."""
    modules = model.named_modules() if isinstance(model, nn.Module) else ()
    for name, _ in modules:
        if name.endswith(("qkv_proj", "query_key_value", "c_attn", "Wqkv", "gate_up_proj")):
            return f" (its '{name}' fuses projections that must be quantised one by one)"
    return ""


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a causal language model, in order."""
    layers = model.get_submodule(family_of(model).layers)
    assert isinstance(layers, nn.ModuleList)
    return layers


def attention_projections(model: nn.Module, layer: int) -> list[nn.Module]:
    """The query, key and value projections of a decoder layer, in the order in which they run;
    negative numbers count from the last layer."""
    layers = decoder_layers(model)
    if not -len(layers) <= layer < len(layers):
        raise UserError(
            f"layer {layer}: there are {len(layers)} decoder layers, 0 to {len(layers) - 1}; -1 is "
            "the last one"
        )
    paths = [path for path in family_of(model).projections if path.endswith(QKV)]
    return [layers[layer].get_submodule(path) for path in paths]


def expert_paths(layer: nn.Module, path: str) -> list[str]:
    """Where a projection of an MLP is in a layer: at `path`, or once in every expert."""
    parent, _, name = path.partition(".")
    experts = getattr(getattr(layer, parent, None), "experts", None)
    if experts is None:
        return [path]
    return [f"{parent}.experts.{number}.{name}" for number in range(len(experts))]


def norm_eps(config: PretrainedConfig) -> float:
    """The epsilon of the family's RMSNorms, which SubLN shares."""
    return float(config.rms_norm_eps)

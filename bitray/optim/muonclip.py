"""MuonClip: Muon, and QK-clip after every step (Kimi K2, arXiv 2507.20534).

Logits are measured exactly, in tiles, where transformers hands over queries and keys after RoPE;
bounds from norms would clip heads that need it not. What the next step will see is what a clip
leaves and what the step's update adds. So, other than in the paper, growth is anticipated: clips
are by `tau / (S g^1.5)`, with S the largest logit seen and g the most that it has lately grown by
in a step; at usual rates g is hardly more than 1. It is no bound: on a case built to explode, tau
100, at 20 and 80 times the usual rate, 14 of 16 tries never saw more than tau, the other two once
(101 and 105). Without g logits settle at 112; with g of the last step alone, or without the power,
they keep crossing tau (114 at most).
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate

from bitray.nn.linear import BitLinear
from bitray.optim.groups import Group
from bitray.optim.muon import MuonOptimizer, MuonSettings

MEASURED = "sdpa_measured"
"""The name under which transformers knows sdpa that also measures."""
_TILE = 256
_MEMORY = 0.99
"""How much of a growth is still reckoned with a step later."""
_CAUTION = 1.5
_SKIPPED = (
    "muonclip: QK-clip is skipped: q and k are normalised in this model, so scaling their "
    "projections would not scale the logits"
)


class MuonClip(MuonSettings):
    """Muon that keeps attention logits from exploding."""

    type: Literal["muonclip"] = "muonclip"
    tau: float = Field(default=100.0, gt=0)
    """The largest attention logit that is let be."""

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model's trainable parameters, after they have been sharded."""
        # what is frozen cannot grow
        attentions = [a for a in measure(model) if a.q_proj.weight.requires_grad]
        return MuonClipOptimizer(self.muon_groups(model, self.type), attentions, self.tau)


class MuonClipOptimizer(MuonOptimizer):
    """Muon and AdamW, then QK-clip of what was measured since the last step."""

    def __init__(self, groups: list[Group], attentions: Sequence[Any], tau: float) -> None:
        super().__init__(groups)
        self.attentions = attentions
        self.tau = tau
        self.reported: dict[str, Tensor] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; the logits of all layers are reduced at once."""
        super().step()
        if not self.attentions:
            return
        seen = torch.stack([attention.max_logits for attention in self.attentions])
        if isinstance(self.attentions[0].q_proj.weight, DTensor):
            group = self.attentions[0].q_proj.weight.device_mesh.get_group()
            dist.all_reduce(seen, dist.ReduceOp.MAX, group=group)
        clipped = torch.stack(
            [self._clip(*each) for each in zip(self.attentions, seen, strict=True)]
        ).mean()
        self.reported = {"max_attention_logit": seen.max(), "qk_clipped_layers": clipped}

    def _clip(self, attention: Any, seen: Float[Tensor, " heads"]) -> Tensor:
        """Clip a layer by what was seen of it, 0 where nothing was; whether anything had to be."""
        state = self.state[attention.q_proj.weight]
        if "logits_left" not in state:
            state["logits_left"] = torch.zeros_like(seen)
            state["logits_growth"] = torch.ones_like(seen)
        left, growth = state["logits_left"], state["logits_growth"]
        now = torch.where((left > 0) & (seen > 0), seen / left, 1.0)
        growth.copy_(torch.maximum(now, 1 + _MEMORY * (growth - 1)))
        factor = (self.tau / (seen * growth**_CAUTION)).clamp(max=1.0)
        left.copy_(seen * clip(attention, factor))
        attention.max_logits.zero_()
        return (factor < 1).any().double()

    def report(self) -> dict[str, float]:
        """Of the last step: the largest logit before clipping, and the share of layers clipped."""
        return {name: float(value) for name, value in self.reported.items()}


def clip(attention: Any, factor: Float[Tensor, " heads"]) -> Float[Tensor, " heads"]:
    """Scale queries and keys so that the logits of head h shrink to `factor[h]` or less; what they
    shrink to.

    A ternary tensor has one scale, so it is scaled as a whole; a factor for some of its rows would
    change codes instead of logits.
    """
    per_key = factor.view(-1, attention.num_key_value_groups).amin(1)
    if isinstance(attention.q_proj, BitLinear) or isinstance(attention.k_proj, BitLinear):
        factor, per_key = (factor.min().expand(len(heads)) for heads in (factor, per_key))
    for layer, heads in ((attention.q_proj, factor), (attention.k_proj, per_key)):
        rows = heads.sqrt().repeat_interleave(attention.head_dim)
        _scale_rows(layer.weight, rows[:, None])
        if layer.bias is not None:
            _scale_rows(layer.bias, rows)
    return (factor * per_key.repeat_interleave(attention.num_key_value_groups)).sqrt()


def _scale_rows(parameter: Tensor, factor: Tensor) -> None:
    if isinstance(parameter, DTensor):
        mesh = parameter.device_mesh
        factor = DTensor.from_local(factor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    parameter.mul_(factor)


# -------------------------------------------------------------------------------------- measuring


def measure(model: nn.Module) -> list[Any]:
    """From now on training forwards note the largest logit of each head. The attention modules, or
    none where q and k are normalised."""
    found: list[Any] = [m for m in model.modules() if hasattr(m, "q_proj") and hasattr(m, "k_proj")]
    if any(hasattr(attention, "q_norm") for attention in found):
        if not dist.is_initialized() or dist.get_rank() == 0:
            print(_SKIPPED)
        return []
    # Settings are read without this library, which takes seconds to import.
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    AttentionInterface.register(MEASURED, _measured_attention)
    AttentionMaskInterface.register(MEASURED, sdpa_mask)
    for attention in found:
        assert attention.config._attn_implementation in {"sdpa", MEASURED}
        attention.config._attn_implementation = MEASURED
        heads = attention.config.num_attention_heads
        zeros = torch.zeros(heads, device=attention.q_proj.weight.device)
        attention.register_buffer("max_logits", zeros, persistent=False)
    return found


def _measured_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **options: Any,
) -> tuple[Tensor, None]:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    if module.training and torch.is_grad_enabled():
        with torch.no_grad():
            largest = largest_logits(query, key, attention_mask, options["scaling"])
            module.max_logits.copy_(torch.maximum(module.max_logits, largest))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **options)


def largest_logits(
    query: Float[Tensor, "batch heads n dim"],
    key: Float[Tensor, "batch keys m dim"],
    mask: Tensor | None,
    scaling: float,
) -> Float[Tensor, " heads"]:
    """The largest logit of each head among the pairs that attend, 0 at least; without a mask those
    of a causal model. What is not finite is left out: such a step is skipped anyway."""
    groups = query.shape[1] // key.shape[1]
    keys = key.repeat_interleave(groups, 1).transpose(2, 3)
    positions = torch.arange(query.shape[2], device=query.device)
    largest = torch.zeros(query.shape[1], device=query.device)
    for start in range(0, query.shape[2], _TILE):
        rows = slice(start, start + _TILE)
        logits = (query[:, :, rows] @ keys).float() * scaling
        if mask is None:
            allowed = positions[rows, None] >= positions[None, : key.shape[2]]
        else:
            tile = mask[:, :, rows]
            allowed = tile if tile.dtype == torch.bool else tile > torch.finfo(tile.dtype).min / 2
        logits = torch.where(allowed & logits.isfinite(), logits, 0.0)
        largest = torch.maximum(largest, logits.amax((0, 2, 3)))
    return largest

"""Low-rank correction of a ternary layer (arXiv 2412.07902): the layer, and its settings."""

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import Field, field_validator
from torch import Tensor, nn
from torch.nn import functional as F

from bitray.settings import Settings, UserError

Rank = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class LowRank(Settings):
    """A correction of every ternary layer, which alone is trained."""

    rank: Rank = 0.1
    """Below 1 a share of the layer's smaller side, else a number."""
    init: Literal["kaiming", "svd", "closed_form"] = "kaiming"
    """`kaiming`: V random, U zero, which changes nothing at first. `svd`: the best approximation of
    W - Q(W), W the original weight. `closed_form`: of the layer's outputs on a calibration batch.
    The last two are dropped where they raise the loss on that batch."""

    @field_validator("rank")
    @classmethod
    def _is_share_or_number(cls, rank: float) -> float:
        if rank >= 1 and rank != int(rank):
            raise ValueError(f"{rank:g} is neither a share below 1 nor a whole number")
        return rank


def rank_of(rank: float | int, in_features: int, out_features: int) -> int:
    """The rank meant for a layer; `UserError` for a number larger than the layer."""
    smaller = min(in_features, out_features)
    if rank > smaller:
        raise UserError(
            f"lrc.rank: {rank:g} is larger than the smaller side of a layer of {in_features} "
            f"inputs and {out_features} outputs; take at most {smaller}, or a share such as 0.1"
        )
    return max(1, int(rank * smaller)) if rank < 1 else int(rank)


class LowRankCorrection(nn.Module):
    """`U (V^T x)`, of an input that is not quantised. New, it is zero, but learns: U is zero and V
    random (Kaiming); with both zero no gradient would ever reach either."""

    def __init__(self, in_features: int, out_features: int, rank: int) -> None:
        super().__init__()
        self.u = nn.Parameter(torch.empty(out_features, rank))
        self.v = nn.Parameter(torch.empty(in_features, rank))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """U zero, V uniform within 1 / sqrt(in)."""
        nn.init.zeros_(self.u)
        nn.init.kaiming_uniform_(self.v.data.T, a=5**0.5)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """In the dtype of x, or of autocast."""
        return F.linear(F.linear(x, self.v.T.to(x.dtype)), self.u.to(x.dtype))

    def extra_repr(self) -> str:
        return f"{self.v.shape[0]}, {self.u.shape[0]}, rank={self.u.shape[1]}"

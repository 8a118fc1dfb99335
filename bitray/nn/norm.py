"""SubLN: the RMSNorm that a ternary projection puts on its own input."""

import torch
from jaxtyping import Float, Float32
from torch import Tensor, nn
from torch.nn import functional as F


class SubLN(nn.Module):
    """RMSNorm with a gain, computed and returned in fp32 whatever comes in.

    The quantiser behind it decides in fp32, so rounding to bf16 in between would only cost codes.
    Placed as in BitDistill (arXiv 2510.13998).
    """

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.width = width
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Float[Tensor, "*tokens width"]) -> Float32[Tensor, "*tokens width"]:
        """`x / rms(x) * gain` over the last axis."""
        return F.rms_norm(x.float(), (self.width,), self.weight.float(), self.eps)

    def extra_repr(self) -> str:
        return f"{self.width}, eps={self.eps}"

"""The two quantisers of BitNet b1.58 (arXiv 2402.17764), as pure functions of fp32 values.

Codes are integers in int8, scales are fp32, values are `codes * scale`. Decisions are always taken
in fp32: rounding a bf16 copy would flip codes near the thresholds.
"""

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor

TINY = 1e-5
"""Smallest scale: keeps all-zero tensors at zero instead of NaN."""


def ternary_scale(weight: Float[Tensor, "out in"]) -> Float32[Tensor, ""]:
    """`max(mean|W|, 1e-5)`, summed in fp64 so that no order of summation shows in fp32."""
    total = weight.detach().abs().sum(dtype=torch.float64)
    return (total / weight.numel()).float().clamp_min(TINY)


def ternary_codes(
    weight: Float[Tensor, "out in"], scale: Float32[Tensor, ""]
) -> Float32[Tensor, "out in"]:
    """`clip(round(W / d), -1, 1)`, half to even, still as fp32 numbers."""
    return (weight.detach().float() / scale).round_().clamp_(-1, 1)


def ternary(weight: Float[Tensor, "out in"]) -> tuple[Int8[Tensor, "out in"], Float32[Tensor, ""]]:
    """Codes in {-1, 0, 1} and the one scale of a weight matrix."""
    scale = ternary_scale(weight)
    return ternary_codes(weight, scale).to(torch.int8), scale


def token_range(x: Float[Tensor, "*tokens width"]) -> Float32[Tensor, "*tokens 1"]:
    """`g = max(max|x|, 1e-5)` of every token."""
    return x.detach().float().abs().amax(-1, keepdim=True).clamp_min(TINY)


def token_codes(
    x: Float[Tensor, "*tokens width"], largest: Float32[Tensor, "*tokens 1"]
) -> Float32[Tensor, "*tokens width"]:
    """`clip(round(x * (127 / g)), -128, 127)`, in the engines' order, still as fp32 numbers."""
    return (x.detach().float() * (127 / largest)).round_().clamp_(-128, 127)


def int8_per_token(
    x: Float[Tensor, "*tokens width"],
) -> tuple[Int8[Tensor, "*tokens width"], Float32[Tensor, "*tokens 1"]]:
    """Codes in [-128, 127] and one scale `g / 127` per token: `x ~ codes * scale`."""
    largest = token_range(x)
    return token_codes(x, largest).to(torch.int8), largest / 127

"""The product of a BitLinear in 8-bit floats, for GPUs whose tensor cores take them twice as fast.

An approximation, off unless asked for: E4M3 (Micikevicius et al., arXiv 2209.05433) has 4
significant bits, so of the 256 integer codes of an activation it holds 80, and rounds the others by
up to 1 in 16; the ternary codes are exact. Every row has its own scale. The fp32 masters and the
decisions taken from them are as in the exact kernel.
"""

from typing import Any

import torch
from jaxtyping import Float, Float32
from torch import Tensor
from torch.nn import functional as F

from bitray.nn.quantize import int8_per_token, ternary_codes, ternary_scale

E4M3 = torch.float8_e4m3fn
LARGEST = torch.finfo(E4M3).max
ALIGNED = 16
"""What all three sizes of a product have to be multiples of."""


def scaled_rows(
    x: Float[Tensor, "rows width"],
) -> tuple[Float[Tensor, "rows width"], Float32[Tensor, "rows 1"]]:
    """E4M3 values and a scale per row, `x ~ values * scale`; a row's largest becomes 448."""
    largest = x.float().abs().amax(-1, keepdim=True)
    scale = (largest / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)  # of a row of zeros
    return (x.float() / scale).clamp_(-LARGEST, LARGEST).to(E4M3), scale


def scaled_product(
    a: Float[Tensor, "rows inner"],
    b: Float[Tensor, "columns inner"],
    a_scale: Float32[Tensor, "rows 1"],
    b_scale: Float32[Tensor, "1 columns"],
    dtype: torch.dtype,
) -> Float[Tensor, "rows columns"]:
    """`(a @ b.T) * a_scale * b_scale` of E4M3 values, summed in fp32, rounded to `dtype`.

    Both lie row by row along the inner axis, which the hardware wants to be contiguous.
    """
    assert a.dtype == b.dtype == E4M3
    inner = -a.shape[1] % ALIGNED
    if inner:  # zeros add nothing
        a, b = (F.pad(t.view(torch.uint8), (0, inner)).view(E4M3) for t in (a, b))
    rows = -len(a) % ALIGNED
    if rows:
        a = F.pad(a.view(torch.uint8), (0, 0, 0, rows)).view(E4M3)
        a_scale = F.pad(a_scale, (0, 0, 0, rows))
    out = torch._scaled_mm(
        a.contiguous(), b.contiguous().t(), a_scale.contiguous(), b_scale.contiguous(),
        out_dtype=dtype,
    )  # fmt: skip
    return out[: len(out) - rows]


class TernaryFP8(torch.autograd.Function):
    """A BitLinear at strength 1. Saves the E4M3 values of x's codes: one byte a number, as int8."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        accumulator: torch.dtype,
    ) -> Tensor:
        codes, scale = int8_per_token(x)
        codes = codes.flatten(0, -2).to(torch.float32).to(E4M3)
        weight_scale = ternary_scale(weight)
        ctx.save_for_backward(codes, scale.flatten(0, -2), weight, weight_scale)
        ctx.accumulator, ctx.shape, ctx.input_dtype = accumulator, x.shape, x.dtype
        signs = ternary_codes(weight, weight_scale).to(E4M3)
        columns = weight_scale.expand(1, len(weight))
        out = scaled_product(codes, signs, scale.flatten(0, -2), columns, accumulator)
        out = out.view(*x.shape[:-1], len(weight))
        return (out if bias is None else out + bias).to(dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, weight, weight_scale = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        grad_x = grad_weight = grad_bias = None
        if ctx.needs_input_grad[0]:
            values, rows = scaled_rows(grad)
            signs = ternary_codes(weight, weight_scale).t().to(E4M3)
            columns = weight_scale.expand(1, len(signs))
            grad_x = scaled_product(values, signs, rows, columns, ctx.accumulator)
            grad_x = grad_x.view(ctx.shape).to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            # the token scale goes into the gradient, whose rows are outputs here
            values, rows = scaled_rows((grad * scale).t())
            ones = torch.ones(1, codes.shape[1], device=grad.device)
            inputs = codes.view(torch.uint8).t().contiguous().view(E4M3)
            grad_weight = scaled_product(values, inputs, rows, ones, ctx.accumulator)
            grad_weight = grad_weight.to(weight.dtype)
        if ctx.needs_input_grad[2]:
            grad_bias = grad.sum(0, dtype=torch.float32)
        return grad_x, grad_weight, grad_bias, None, None

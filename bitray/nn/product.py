"""The product of a ternary layer at full strength, over integer codes: three ways, one result.

Integers are exact whichever way they are summed, since 128 * in < 2^24 for in <= 131072: by int8
hardware of CPUs, by int8 tensor cores of GPUs (`nn.kernel`), or in floats that hold the integers.
"""

from importlib.util import find_spec

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor
from torch.nn import functional as F

_VNNI = torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()
"""Without VNNI oneDNN may saturate int8 products, which would not be exact."""
_LEAST = 1024
"""Tokens, and features on either side, below which a GPU keeps to floats: on an H200 the kernel was
slower at a width of 576 (0.67 times as fast), faster at 2048 (1.42)."""


def ternary_product(  # noqa: PLR0917 - two factors, each with its scale
    codes: Int8[Tensor, "*tokens in"],
    scale: Float32[Tensor, "*tokens 1"],
    signs: Float[Tensor, "out in"] | Int8[Tensor, "out in"],
    weight_scale: Float32[Tensor, ""],
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
    int8_kernel: bool = False,
) -> Float[Tensor, "*tokens out"]:
    """`(codes @ signs.T) * (scale * weight_scale) + bias` in fp32, rounded to `dtype`.

    Where floats hold the integers and `dtype` is bf16, the product is rounded before the scale too.
    `int8_kernel`: by `nn.kernel` where that pays, on a GPU for which `kernel_problem` knows none.
    """
    rows, (out, width) = scale.numel(), signs.shape
    if int8_kernel and min(rows, out, width) >= _LEAST:
        from bitray.nn.kernel import scaled_int8_product

        found = scaled_int8_product(
            codes.reshape(rows, width).contiguous(), signs.to(torch.int8).contiguous(),
            scale.reshape(rows), weight_scale, bias, dtype,
        )  # fmt: skip
        return found.view(*codes.shape[:-1], out)
    if codes.device.type == "cpu" and _VNNI and width > 1:  # wrong for width 1
        product = torch._int_mm(codes.reshape(-1, width), signs.to(torch.int8).t())
        product = product.view(*codes.shape[:-1], out).float()
    else:
        product = F.linear(codes.to(dtype), signs.to(dtype)).float()
    product = product * (scale * weight_scale)
    return (product if bias is None else product + bias).to(dtype)


def kernel_problem(device: torch.device) -> str | None:
    """Why `nn.kernel` cannot run on this device, in a few words; None: it can."""
    if device.type != "cuda":
        return "needs GPUs, these workers have CPUs"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs GPUs of compute capability 8.0 (Ampere) or newer"
    return None if find_spec("triton") else "needs the package triton, which is not installed"

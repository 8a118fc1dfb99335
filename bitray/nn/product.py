"""The product of a ternary layer at full strength, over integer codes: three ways, one result.

Integers are exact whichever way they are summed, since 128 * in < 2^24 for in <= 131072: by int8
hardware of CPUs, by int8 tensor cores of GPUs (`nn.kernel`), or in floats that hold the integers.
"""

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor
from torch.nn import functional as F

_VNNI = torch.cpu._is_vnni_supported() and torch.backends.mkldnn.is_available()
"""Without VNNI oneDNN may saturate int8 products, which would not be exact."""
_ROWS, _WIDTH = 1024, 1024
"""On GPUs smaller products are no faster in int8."""


def ternary_product(  # noqa: PLR0917 - two factors, each with its scale
    codes: Int8[Tensor, "*tokens in"],
    scale: Float32[Tensor, "*tokens 1"],
    signs: Float[Tensor, "out in"] | Int8[Tensor, "out in"],
    weight_scale: Float32[Tensor, ""],
    bias: Float[Tensor, " out"] | None,
    dtype: torch.dtype,
) -> Float[Tensor, "*tokens out"]:
    """`(codes @ signs.T) * (scale * weight_scale) + bias` in fp32, rounded to `dtype`.

    Where floats hold the integers and `dtype` is bf16, the product is rounded before the scale too.
    """
    flat = codes.reshape(-1, codes.shape[-1])
    if _on_tensor_cores(flat, len(signs)):
        from bitray.nn.kernel import scaled_int8_product

        out = scaled_int8_product(
            flat.contiguous(), signs.to(torch.int8), scale.reshape(-1), weight_scale, bias, dtype
        )
        return out.view(*codes.shape[:-1], len(signs))
    if codes.device.type == "cpu" and _VNNI and codes.shape[-1] > 1:  # wrong for width 1
        product = torch._int_mm(flat, signs.to(torch.int8).t())
        product = product.view(*codes.shape[:-1], len(signs)).float()
    else:
        product = F.linear(codes.to(dtype), signs.to(dtype)).float()
    out = product * (scale * weight_scale)
    return (out if bias is None else out + bias).to(dtype)


def _on_tensor_cores(codes: Tensor, out: int) -> bool:
    rows, width = codes.shape
    return (
        codes.device.type == "cuda" and rows >= _ROWS and min(width, out) >= _WIDTH
        and width % 16 == 0 and int8_kernel()
    )  # fmt: skip


def int8_kernel() -> bool:
    """Whether this process's GPU multiplies integers in a kernel of ours."""
    return (
        torch.cuda.is_available()
        and torch.version.hip is None
        and torch.cuda.get_device_capability() >= (8, 0)
        and torch.utils._triton.has_triton_package()
    )

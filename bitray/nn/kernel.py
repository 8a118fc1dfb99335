"""The product of int8 codes on tensor cores, scaled before it is written. Needs Triton.

A library's product writes 32-bit integers, four bytes a number, for another kernel to read and
scale: on an H200 that eats what int8 gains. Here sums never leave the chip.
"""

from typing import no_type_check

import torch
import triton
import triton.language as tl
from torch import Tensor, library

_ROWS, _COLUMNS = 128, 128
"""Of a tile. With these, 4 warps and 3 stages it was the fastest of 16 on an H200 at every size
from 16384x2048x2048 on."""


@triton.jit
@no_type_check
def _kernel(  # noqa: PLR0917 - launched by position
    x, w, x_scale, w_scale, bias, out, rows, columns, depth,
    BIASED: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    # Tiles go down GROUP rows of tiles at a time, so that neighbours share what the cache holds.
    tile = tl.program_id(0)
    down, across = tl.cdiv(rows, ROWS), tl.cdiv(columns, COLUMNS)
    first = tile // (GROUP * across) * GROUP
    high = tl.minimum(down - first, GROUP)
    row = (first + tile % (GROUP * across) % high) * ROWS + tl.arange(0, ROWS)
    column = tile % (GROUP * across) // high * COLUMNS + tl.arange(0, COLUMNS)
    inner = tl.arange(0, DEPTH)
    # Beyond the edge rows are read again, and their sums never written.
    x_at = x + (row % rows).to(tl.int64)[:, None] * depth + inner[None, :]
    w_at = w + (column % columns).to(tl.int64)[None, :] * depth + inner[:, None]
    total = tl.zeros((ROWS, COLUMNS), tl.int32)
    for start in range(0, depth, DEPTH):
        left = depth - start
        a = tl.load(x_at, mask=inner[None, :] < left, other=0)
        b = tl.load(w_at, mask=inner[:, None] < left, other=0)
        total = tl.dot(a, b, total, out_dtype=tl.int32)
        x_at += DEPTH
        w_at += DEPTH
    scale = tl.load(x_scale + row, mask=row < rows, other=0.0) * tl.load(w_scale)
    value = total.to(tl.float32) * scale[:, None]
    if BIASED:
        value += tl.load(bias + column, mask=column < columns, other=0.0)[None, :]
    at = out + row.to(tl.int64)[:, None] * columns + column[None, :]
    inside = (row < rows)[:, None] & (column < columns)[None, :]
    tl.store(at, value.to(out.dtype.element_ty), mask=inside)


# Opaque to the compiler: of sizes that it holds for dynamic it tells Triton no alignment.
@library.custom_op("bitray::scaled_int8_product", mutates_args=())
@no_type_check
def scaled_int8_product(  # noqa: PLR0917 - as operators of torch take them
    x: Tensor,
    w: Tensor,
    x_scale: Tensor,
    w_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """`(x @ w.T) * x_scale * w_scale + bias`, [rows, out], of int8 x [rows, in] and w [out, in],
    both contiguous; scales fp32, [rows] and []. Exact until its one rounding to `dtype`."""
    (rows, depth), columns = x.shape, len(w)
    out = torch.empty(rows, columns, device=x.device, dtype=dtype)
    tiles = triton.cdiv(rows, _ROWS) * triton.cdiv(columns, _COLUMNS)
    _kernel[(tiles,)](
        x, w, x_scale, w_scale, w_scale if bias is None else bias, out, rows, columns, depth,
        BIASED=bias is not None, ROWS=_ROWS, COLUMNS=_COLUMNS, DEPTH=128, GROUP=8,
        num_warps=4, num_stages=3,
    )  # fmt: skip
    return out


scaled_int8_product.register_fake(
    lambda x, w, x_scale, w_scale, bias, dtype: x.new_empty(len(x), len(w), dtype=dtype)
)

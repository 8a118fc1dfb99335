"""Ternary codes to bytes and back: the tensor layouts of GGUF and of packed Hugging Face files.

Pure NumPy on codes and a scale. Nothing here quantises: the codes are the ones training used, and
no layout asks for a second look at the weights.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from jaxtyping import Float32, Int8, Num, UInt8

from bitray.settings import UserError, nearest

Codes = Int8[np.ndarray, "out in"]
Bytes = UInt8[np.ndarray, " bytes"]

GGUFType = Literal["i2_s", "tq1_0", "tq2_0", "f16", "bf16", "f32"]
GGUF_TYPES: tuple[str, ...] = get_args(GGUFType)

I2_S_TAIL = 32  # bytes after the codes: a float32 scale and 28 zeros


@dataclass(frozen=True)
class FileType:
    """One `type=` of a GGUF export.

    `ggml` is the id of the tensor type, `file_type` the value of `general.file_type`, `block` the
    number of weights that `in_features` must be a multiple of, `floats` the type of embeddings and
    output head in the same file.
    """

    name: str
    ggml: int
    file_type: int
    block: int
    floats: str

    @property
    def ternary(self) -> bool:
        return self.block > 1


FILE_TYPES = {
    kind.name: kind
    for kind in (
        FileType("i2_s", ggml=36, file_type=40, block=128, floats="f16"),
        FileType("tq1_0", ggml=34, file_type=36, block=256, floats="f16"),
        FileType("tq2_0", ggml=35, file_type=37, block=256, floats="f16"),
        FileType("f16", ggml=1, file_type=1, block=1, floats="f16"),
        FileType("bf16", ggml=30, file_type=32, block=1, floats="bf16"),
        FileType("f32", ggml=0, file_type=0, block=1, floats="f32"),
    )
}
GGML_NAMES = {kind.ggml: kind.name for kind in FILE_TYPES.values()}


def file_type(name: str) -> FileType:
    """The type called `name`; a UserError with the nearest one if there is none."""
    if name not in FILE_TYPES:
        raise UserError(
            f"type={name}: unknown GGUF type{nearest(name, FILE_TYPES)}; "
            f"choose one of {', '.join(FILE_TYPES)}"
        )
    return FILE_TYPES[name]


def nbytes(shape: tuple[int, ...], kind: FileType) -> int:
    """Size in bytes of a tensor of this shape and type in a file."""
    count = int(np.prod(shape))
    per_weight = {"i2_s": 1 / 4, "tq1_0": 54 / 256, "tq2_0": 66 / 256, "f32": 4}
    return int(count * per_weight.get(kind.name, 2)) + (I2_S_TAIL if kind.name == "i2_s" else 0)


# ----------------------------------------------------------------------------------------- floats


def bfloat16_bits(values: Num[np.ndarray, "*shape"]) -> np.ndarray:
    """The upper 16 bits of fp32, rounded half to even; finite input."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def pack_floats(values: Float32[np.ndarray, "*shape"], name: str) -> Bytes:
    """`values` as f32, f16 or bf16, little-endian. A value that f16 cannot hold is a UserError."""
    if name == "bf16":
        stored = bfloat16_bits(values).astype("<u2")
    else:
        with np.errstate(over="ignore"):
            stored = values.astype({"f32": "<f4", "f16": "<f2"}[name])
        if not np.isfinite(stored).all():
            raise UserError(f"a weight is not finite as {name}; export as bf16 or f32 instead")
    return np.ascontiguousarray(stored).reshape(-1).view(np.uint8)


def unpack_floats(data: Bytes, name: str) -> Float32[np.ndarray, " n"]:
    """The inverse of `pack_floats`, flat, as fp32."""
    if name == "bf16":
        return (data.view("<u2").astype(np.uint32) << 16).view(np.float32)
    return data.view({"f32": "<f4", "f16": "<f2"}[name]).astype(np.float32)


def rounded(scale: float, name: str) -> np.float32:
    """`scale` as a file of float type `name` holds it."""
    return unpack_floats(pack_floats(np.array([scale], np.float32), name), name)[0]


# ------------------------------------------------------------------------------------------- I2_S


def pack_i2_s(codes: Codes, scale: float) -> Bytes:
    """microsoft/BitNet's I2_S: four 2-bit codes a byte, 32 apart, and one fp32 scale at the end."""
    groups = (codes + 1).astype(np.uint8).reshape(-1, 4, 32)
    packed = groups[:, 0] << 6 | groups[:, 1] << 4 | groups[:, 2] << 2 | groups[:, 3]
    tail = np.zeros(I2_S_TAIL, np.uint8)
    tail[:4] = np.array([scale], "<f4").view(np.uint8)
    return np.concatenate([packed.reshape(-1), tail])


def unpack_i2_s(data: Bytes, shape: tuple[int, ...]) -> tuple[Codes, Float32[np.ndarray, " 1"]]:
    packed = data[:-I2_S_TAIL].reshape(-1, 1, 32)
    shifts = np.array([6, 4, 2, 0], np.uint8).reshape(1, 4, 1)
    codes = ((packed >> shifts) & 3).astype(np.int8) - np.int8(1)
    return codes.reshape(shape), data[-I2_S_TAIL:][:4].view("<f4").astype(np.float32)


# ----------------------------------------------------------------------------------- TQ1_0, TQ2_0


def _with_block_scales(packed: UInt8[np.ndarray, "blocks width"], scale: float) -> Bytes:
    tail = np.full((len(packed), 1), scale, "<f2").view(np.uint8)
    return np.concatenate([packed, tail], axis=1).reshape(-1)


def pack_tq2_0(codes: Codes, scale: float) -> Bytes:
    """ggml's TQ2_0: 64 bytes of 2-bit codes a block of 256, then the block's scale in f16."""
    groups = (codes + 1).astype(np.uint8).reshape(-1, 2, 4, 32)
    packed = groups[:, :, 0] | groups[:, :, 1] << 2 | groups[:, :, 2] << 4 | groups[:, :, 3] << 6
    return _with_block_scales(packed.reshape(-1, 64), scale)


def unpack_tq2_0(data: Bytes, shape: tuple[int, ...]) -> tuple[Codes, Float32[np.ndarray, " n"]]:
    blocks = data.reshape(-1, 66)
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(1, 1, 4, 1)
    digits = (blocks[:, :64].reshape(-1, 2, 1, 32) >> shifts) & 3
    codes = digits.astype(np.int8) - np.int8(1)
    return codes.reshape(shape), _block_scales(blocks)


def _block_scales(blocks: UInt8[np.ndarray, "blocks width"]) -> Float32[np.ndarray, " blocks"]:
    return np.ascontiguousarray(blocks[:, -2:]).view("<f2").reshape(-1).astype(np.float32)


# A block of TQ1_0 is three pieces, each (bytes, digits a byte): 32*5 + 16*5 + 4*4 = 256 weights.
_TQ1_PIECES = ((32, 5), (16, 5), (4, 4))


def pack_tq1_0(codes: Codes, scale: float) -> Bytes:
    """ggml's TQ1_0: up to five base-3 digits a byte, 52 bytes a block of 256, then its f16 scale.

    A byte holds `ceil(256 * v / 243)` for a five-digit number v, so that each digit comes out of a
    multiplication by 3 as the carry beyond 8 bits.
    """
    digits = (codes + 1).reshape(-1, 256).astype(np.uint16)
    pieces, start = [], 0
    for width, count in _TQ1_PIECES:
        piece = digits[:, start : start + width * count].reshape(-1, count, width)
        powers = (3 ** np.arange(4, 4 - count, -1)).astype(np.uint16)
        value = np.einsum("bcw,c->bw", piece, powers)
        pieces.append(((value.astype(np.uint32) * 256 + 242) // 243).astype(np.uint8))
        start += width * count
    return _with_block_scales(np.concatenate(pieces, axis=1), scale)


def unpack_tq1_0(data: Bytes, shape: tuple[int, ...]) -> tuple[Codes, Float32[np.ndarray, " n"]]:
    blocks = data.reshape(-1, 54)
    pieces, start = [], 0
    for width, count in _TQ1_PIECES:
        powers = (3 ** np.arange(count)).astype(np.uint8).reshape(1, count, 1)
        shifted = blocks[:, None, start : start + width] * powers  # modulo 256, as intended
        digits = (shifted.astype(np.uint16) * 3) >> 8
        pieces.append(digits.reshape(len(blocks), -1))
        start += width
    codes = np.concatenate(pieces, axis=1).astype(np.int8) - np.int8(1)
    return codes.reshape(shape), _block_scales(blocks)


# ------------------------------------------------------------------------------------ any GGUF type

_PACK: dict[str, Callable[[Codes, float], Bytes]] = {
    "i2_s": pack_i2_s,
    "tq1_0": pack_tq1_0,
    "tq2_0": pack_tq2_0,
}
_UNPACK = {"i2_s": unpack_i2_s, "tq1_0": unpack_tq1_0, "tq2_0": unpack_tq2_0}


def pack(codes: Codes, scale: float, kind: FileType) -> Bytes:
    """The bytes of one weight: packed codes with their scale, or `codes * scale` as floats."""
    if not kind.ternary:
        return pack_floats(codes.astype(np.float32) * np.float32(scale), kind.name)
    assert codes.shape[1] % kind.block == 0, (codes.shape, kind)
    return _PACK[kind.name](codes, scale)


def unpack(
    data: Bytes, shape: tuple[int, ...], kind: FileType
) -> tuple[Codes, Float32[np.ndarray, " n"]]:
    """Codes and the scales found (one for a tensor, or one for each block of it).

    Of floats the codes are the signs and the scales the smallest and largest magnitude: they are
    equal unless something is wrong, and absent when every code is zero.
    """
    if kind.ternary:
        return _UNPACK[kind.name](data, shape)
    values = unpack_floats(data, kind.name)
    magnitudes = np.abs(values[values != 0])
    extremes = [magnitudes.min(), magnitudes.max()] if magnitudes.size else []
    return np.sign(values).astype(np.int8).reshape(shape), np.array(extremes, np.float32)


# ------------------------------------------------------------------------------------- Hugging Face


def pack_rows(codes: Codes) -> UInt8[np.ndarray, "quarter in"]:
    """transformers' BitNet packing: four row blocks in one byte, the first in the lowest bits."""
    assert codes.shape[0] % 4 == 0, codes.shape
    blocks = (codes + 1).astype(np.uint8).reshape(4, -1, codes.shape[1])
    return blocks[0] | blocks[1] << 2 | blocks[2] << 4 | blocks[3] << 6


def unpack_rows(packed: UInt8[np.ndarray, "quarter in"]) -> Codes:
    shifts = np.array([0, 2, 4, 6], np.uint8).reshape(4, 1, 1)
    codes = ((packed[None] >> shifts) & 3).astype(np.int8) - np.int8(1)
    return codes.reshape(-1, packed.shape[1])

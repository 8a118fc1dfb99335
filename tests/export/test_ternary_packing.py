"""Bytes of every tensor type, against decoders written from the formats one weight at a time."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType
from gguf import quants as gguf_quants
from gguf_engine import i2_s_codes, tq1_0_values, tq2_0_values
from hypothesis import given, settings
from hypothesis import strategies as st

from bitray.export.packing import (
    FILE_TYPES,
    bfloat16_bits,
    file_type,
    nbytes,
    pack,
    pack_floats,
    pack_rows,
    unpack,
    unpack_floats,
    unpack_rows,
)
from bitray.settings import UserError

SCALE = 0.0123456


def codes_of(seed: int, rows: int, columns: int, zeros: float = 0.3) -> np.ndarray:
    generator = np.random.default_rng(seed)
    signs = generator.choice([-1, 1], (rows, columns))
    return np.where(generator.random((rows, columns)) < zeros, 0, signs).astype(np.int8)


def test_i2_s_puts_every_weight_where_bitnet_cpp_looks_for_it():
    codes = codes_of(0, 3, 256)
    data = pack(codes, SCALE, FILE_TYPES["i2_s"])
    flat = (codes + 1).reshape(-1)
    for b in range(len(flat) // 128):
        for p in range(32):
            quarters = [int(flat[128 * b + 32 * i + p]) for i in range(4)]
            expected = quarters[0] << 6 | quarters[1] << 4 | quarters[2] << 2 | quarters[3]
            assert data[32 * b + p] == expected
    assert len(data) == codes.size // 4 + 32
    assert data[codes.size // 4 :].tobytes() == np.float32(SCALE).tobytes() + bytes(28)


@pytest.mark.parametrize("kind", ["tq1_0", "tq2_0"])
def test_tq_bytes_are_those_of_the_gguf_library_given_exact_products(kind: str):
    codes = codes_of(1, 5, 512)
    scale = float(np.float16(SCALE))  # the library reads the scale off the weights, in f16
    expected = gguf_quants.quantize(
        codes.astype(np.float32) * np.float32(scale), GGMLQuantizationType[kind.upper()]
    )
    assert np.array_equal(pack(codes, scale, FILE_TYPES[kind]), expected.reshape(-1))


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), rows=st.integers(1, 5), zeros=st.sampled_from([0.0, 0.3, 1.0]))
def test_every_type_gives_back_codes_and_scale(seed: int, rows: int, zeros: float):
    codes = codes_of(seed, rows, 256, zeros)
    for kind in FILE_TYPES.values():
        data = pack(codes, SCALE, kind)
        assert len(data) == nbytes(codes.shape, kind)
        found, scales = unpack(data, codes.shape, kind)
        assert np.array_equal(found, codes)
        if kind.ternary or codes.any():
            assert np.allclose(scales, SCALE, rtol=5e-3, atol=0)
        if kind.name in ("i2_s", "f32") and codes.any():
            assert set(scales) == {np.float32(SCALE)}


@pytest.mark.parametrize("zeros", [0.0, 0.3, 1.0])
def test_independent_decoders_read_the_same_weights(zeros: float):
    codes = codes_of(2, 4, 512, zeros)
    found, scale = i2_s_codes(pack(codes, SCALE, FILE_TYPES["i2_s"]), codes.size)
    assert np.array_equal(found, codes.reshape(-1)) and scale == np.float32(SCALE)
    for kind, decode in (("tq1_0", tq1_0_values), ("tq2_0", tq2_0_values)):
        values = decode(pack(codes, SCALE, FILE_TYPES[kind]), codes.size)
        assert np.array_equal(values, codes.reshape(-1) * float(np.float16(SCALE)))


def test_hugging_face_bytes_hold_four_row_blocks():
    codes = codes_of(3, 12, 7)
    packed = pack_rows(codes)
    for row in range(3):
        for column in range(7):
            parts = [int(codes[3 * i + row, column] + 1) << 2 * i for i in range(4)]
            assert packed[row, column] == sum(parts)
    assert np.array_equal(unpack_rows(packed), codes)


def test_bfloat16_rounds_half_to_even_as_torch_does():
    import torch

    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    halfway = (np.arange(64, dtype=np.uint32) * 0x8000 + 0x3F800000).view(np.float32)
    values = np.concatenate([values, halfway, [np.float32(0), np.float32(-0.0)]])
    expected = torch.from_numpy(values).bfloat16().view(torch.int16).numpy().view(np.uint16)
    assert np.array_equal(bfloat16_bits(values), expected)
    assert np.array_equal(unpack_floats(pack_floats(values, "f32"), "f32"), values)


def test_a_value_beyond_f16_is_refused_rather_than_infinite():
    with pytest.raises(UserError, match="not finite as f16"):
        pack_floats(np.array([1e6], np.float32), "f16")


def test_an_unknown_type_names_the_nearest():
    with pytest.raises(UserError, match=r"nearest: 'tq2_0'.*i2_s, tq1_0"):
        file_type("tq20")

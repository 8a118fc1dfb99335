"""Padding and row order: small enough, legal, and reversible."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitray.export.layout import PROJECTION_AXES, Dims, Layout, Rules, pad

SMOLLM2_135M = Dims(hidden=576, heads=9, kv_heads=3, head_dim=64, ffn=1536)
SMOLLM2_360M = Dims(hidden=960, heads=15, kv_heads=5, head_dim=64, ffn=2560)
QWEN2_05B = Dims(hidden=896, heads=14, kv_heads=2, head_dim=64, ffn=4864)
QWEN3_4B = Dims(hidden=2560, heads=32, kv_heads=8, head_dim=128, ffn=9728)


def rules(block: int, square: bool = False, one_ratio: bool = False, fixed: bool = False) -> Rules:
    return Rules(block, square, one_ratio, fixed)


@pytest.mark.parametrize("block", [128, 256])
def test_smollm2_with_subln_grows_by_four_thirds_everywhere(block: int):
    expected = Dims(hidden=768, heads=12, kv_heads=4, head_dim=64, ffn=2048)
    assert pad(SMOLLM2_135M, rules(block, square=True, one_ratio=True)) == expected


def test_without_subln_the_axes_grow_on_their_own():
    found = pad(SMOLLM2_135M, rules(256))
    assert found == Dims(hidden=768, heads=12, kv_heads=4, head_dim=64, ffn=1536)
    # two key heads are kept: heads are added inside the groups, not a whole group of seven
    found = pad(QWEN2_05B, rules(256, square=True))
    assert found == Dims(hidden=1024, heads=16, kv_heads=2, head_dim=64, ffn=4864)


def test_what_fits_stays():
    assert pad(QWEN3_4B, rules(256, fixed=True)) == QWEN3_4B
    assert pad(SMOLLM2_360M, rules(1, square=True, one_ratio=True)) == SMOLLM2_360M


def test_a_fixed_hidden_size_cannot_be_padded():
    odd = Dims(hidden=960, heads=16, kv_heads=8, head_dim=128, ffn=2560)
    assert pad(odd, rules(256, fixed=True)) is None


@settings(max_examples=60, deadline=None)
@given(
    group=st.integers(1, 7),
    kv_heads=st.integers(1, 6),
    head_dim=st.sampled_from([32, 64, 128]),
    ffn=st.integers(1, 40),
    block=st.sampled_from([128, 256]),
    square=st.booleans(),
    one_ratio=st.booleans(),
)
def test_padded_widths_obey_the_rules(*, group, kv_heads, head_dim, ffn, block, square, one_ratio):
    heads = group * kv_heads
    dims = Dims(heads * head_dim, heads, kv_heads, head_dim, ffn * 64)
    found = pad(dims, rules(block, square, one_ratio))
    if found is None:
        return
    assert all(width % block == 0 for width in (found.hidden, found.attention, found.ffn))
    assert found.heads % found.kv_heads == 0 and found.kv_heads >= dims.kv_heads
    assert found.hidden >= dims.hidden and found.ffn >= dims.ffn
    assert not square or found.hidden == found.attention
    if one_ratio:
        # a padded head that shared a real key head would put something into SubLN's mean
        assert found.heads // found.kv_heads == group
        ratio = found.hidden / dims.hidden
        assert ratio == pytest.approx(found.ffn / dims.ffn)
        assert ratio == pytest.approx(found.attention / dims.attention)


def test_heads_stay_with_their_key_heads():
    dims = Dims(hidden=12, heads=6, kv_heads=2, head_dim=2, ffn=4)
    padded = Dims(hidden=16, heads=8, kv_heads=2, head_dim=2, ffn=4)
    layout = Layout(dims, padded, rotary_pairs=False)
    # groups of three become groups of four: heads 0 1 2 | 3 4 5 -> 0 1 2 . | 4 5 6 .
    assert layout.index("queries").reshape(6, 2)[:, 0].tolist() == [0, 2, 4, 8, 10, 12]
    assert layout.index("values").tolist() == [0, 1, 2, 3]


def test_rotary_pairs_are_llama_cpps_permutation_of_heads():
    dims = Dims(hidden=32, heads=4, kv_heads=2, head_dim=8, ffn=4)
    layout = Layout(dims, dims, rotary_pairs=True)
    rows = np.arange(32)
    # the known recipe for converting Hugging Face's q to ggml's NORM rotary
    expected = rows.reshape(4, 2, 4).swapaxes(1, 2).reshape(-1)
    placed = layout.place(np.arange(32)[:, None].repeat(32, 1), "queries", "hidden")
    assert np.array_equal(placed[:, 0], expected)
    assert np.array_equal(layout.index("attention"), rows)


@pytest.mark.parametrize("projection", PROJECTION_AXES)
def test_take_is_the_inverse_of_place(projection: str):
    layout = Layout(
        QWEN2_05B,
        pad(QWEN2_05B, rules(256, square=True)),
        rotary_pairs=True,  # type: ignore[arg-type]
    )
    rows, columns = PROJECTION_AXES[projection]
    shape = (len(layout.index(rows)), len(layout.index(columns)))
    values = np.random.default_rng(0).integers(-1, 2, shape).astype(np.int8)
    placed = layout.place(values, rows, columns)
    assert placed.shape == (layout.size(rows), layout.size(columns))
    assert np.array_equal(layout.take(placed, rows, columns), values)
    assert np.abs(placed).sum() == np.abs(values).sum()


def test_a_norm_over_padded_features_is_the_norm_over_real_ones():
    layout = Layout(SMOLLM2_135M, pad(SMOLLM2_135M, rules(256)), rotary_pairs=False)  # type: ignore[arg-type]
    generator = np.random.default_rng(0)
    x, weight = generator.standard_normal((2, 576)) * 1e-3  # small, so that eps matters
    expected = x / np.sqrt((x * x).mean() + 1e-5) * weight
    padded = np.concatenate([x, np.zeros(768 - 576)])
    placed = layout.place_norm(weight.astype(np.float32), "hidden")
    found = padded / np.sqrt((padded * padded).mean() + layout.eps(1e-5)) * placed
    assert np.allclose(found[:576], expected, rtol=1e-6) and not found[576:].any()

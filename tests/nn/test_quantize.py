"""The quantisers against a numpy reference written from the paper's formulas."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitray.nn import int8_per_token, ternary

SCALES = [0.0, 1e-30, 1e-8, 1e-4, 1.0, 300.0, 1e20]


def reference_ternary(weight: np.ndarray) -> tuple[np.ndarray, np.float32]:
    mean = np.float32(np.abs(weight.astype(np.float64)).mean())
    scale = max(mean, np.float32(1e-5))
    return np.clip(np.round(weight / scale), -1, 1).astype(np.int8), scale


def reference_int8(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    codes = np.clip(np.round(x * (np.float32(127) / largest)), -128, 127)
    return codes.astype(np.int8), largest / np.float32(127)


def _random(shape: tuple[int, ...], scale: float, seed: int) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal(shape) * scale).astype(np.float32)


@settings(deadline=None)  # a busy machine is no wrong answer
@given(st.integers(1, 40), st.integers(1, 70), st.sampled_from(SCALES), st.integers(0, 2**32))
def test_ternary_is_the_reference(rows: int, columns: int, scale: float, seed: int) -> None:
    weight = _random((rows, columns), scale, seed)
    codes, d = ternary(torch.from_numpy(weight))
    expected, expected_d = reference_ternary(weight)
    np.testing.assert_array_equal(codes.numpy(), expected)
    assert d.item() == expected_d
    assert (codes.dtype, d.dtype, d.shape) == (torch.int8, torch.float32, ())


@settings(deadline=None)  # a busy machine is no wrong answer
@given(st.integers(1, 12), st.integers(1, 70), st.sampled_from(SCALES), st.integers(0, 2**32))
def test_int8_is_the_reference(tokens: int, width: int, scale: float, seed: int) -> None:
    x = _random((tokens, width), scale, seed)
    codes, scales = int8_per_token(torch.from_numpy(x))
    expected, expected_scales = reference_int8(x)
    np.testing.assert_array_equal(codes.numpy(), expected)
    np.testing.assert_array_equal(scales.numpy(), expected_scales)
    assert (codes.dtype, scales.dtype) == (torch.int8, torch.float32)


def test_rounding_is_half_to_even() -> None:
    # mean|W| = 1, so 0.5 and 1.5 are exact ties; away from zero would give 1 for 0.5
    weight = torch.tensor([[0.5, -0.5, 1.5, -1.5]])
    assert ternary(weight)[0].tolist() == [[0, 0, 1, -1]]
    # g = 127, so codes are the values themselves
    x = torch.tensor([[127.0, 0.5, 1.5, 2.5, -2.5]])
    assert int8_per_token(x)[0].tolist() == [[127, 0, 2, 2, -2]]


def test_zeros_stay_zeros() -> None:
    for codes, scale in (ternary(torch.zeros(4, 6)), int8_per_token(torch.zeros(2, 3, 6))):
        assert not codes.any()
        assert torch.equal(codes * scale, torch.zeros_like(codes, dtype=torch.float32))


def test_a_value_that_is_not_finite_shows_in_the_scale() -> None:
    weight = torch.ones(3, 4)
    weight[1, 2] = torch.nan
    assert ternary(weight)[1].isnan()
    assert int8_per_token(weight)[1].isnan().flatten().tolist() == [False, True, False]


def test_the_scale_of_a_large_matrix_does_not_depend_on_its_order() -> None:
    # an fp32 accumulation is off in the last bits here, and differently for the two orders
    weight = torch.from_numpy(_random((1500, 1000), 0.02, 0).astype(np.float32))
    shuffled = weight.flatten()[torch.randperm(weight.numel())].view_as(weight)
    expected = np.float32(np.abs(weight.numpy().astype(np.float64)).mean())
    assert ternary(weight)[1].item() == ternary(shuffled)[1].item() == expected


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_decisions_on_narrow_inputs_are_taken_in_fp32(dtype: torch.dtype) -> None:
    narrow = torch.from_numpy(_random((16, 64), 1.0, 0)).to(dtype)
    for quantiser in (ternary, int8_per_token):
        for got, expected in zip(quantiser(narrow), quantiser(narrow.float()), strict=True):
            assert torch.equal(got, expected)


def test_autocast_changes_no_code() -> None:
    weight = torch.from_numpy(_random((64, 64), 0.02, 0))
    with torch.autocast("cpu", torch.bfloat16):
        inside = (*ternary(weight), *int8_per_token(weight))
    for got, expected in zip(inside, (*ternary(weight), *int8_per_token(weight)), strict=True):
        assert torch.equal(got, expected)

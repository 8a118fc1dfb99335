"""ZClip against numpy and the equations of its paper."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bitray.optim import Norms, ZClip

norm = st.floats(1e-3, 1e3)
ON = ZClip(enabled=True, warmup_steps=4, ema=0.9, threshold=2.0)


def _after(clip: ZClip, values: list[float]) -> Norms:
    norms = Norms()
    for value in values:
        norms = clip.watch(norms, clip.limit(norms, value))
    return norms


@given(st.lists(norm, min_size=1, max_size=25))
def test_a_warm_up_only_watches(values: list[float]):
    clip = ZClip(enabled=True)
    norms = Norms()
    for value in values:
        assert clip.limit(norms, value) == value
        norms = clip.watch(norms, value)
    assert norms.seen == len(values)
    assert norms.mean == pytest.approx(np.mean(values), rel=1e-9)
    assert norms.variance == pytest.approx(
        np.var(values), rel=1e-6, abs=1e-9 * np.mean(values) ** 2
    )


def test_a_spike_is_clipped_to_the_reciprocal_and_enters_as_it_was_clipped():
    norms = _after(ON, [1.0, 3.0, 1.0, 3.0])  # mean 2, deviation 1
    assert norms == pytest.approx((4, 2.0, 1.0))
    assert ON.limit(norms, 4.0) == 4.0  # z = 2, the threshold itself
    assert ON.limit(norms, 10.0) == pytest.approx(2 + 4 / 8)  # z = 8 becomes 2^2 / 8
    after = ON.watch(norms, 2.5)
    assert after.mean == pytest.approx(0.9 * 2 + 0.1 * 2.5)
    assert after.variance == pytest.approx(0.9 * 1 + 0.1 * (2.5 - after.mean) ** 2)


@given(st.lists(norm, min_size=4, max_size=30), norm)
def test_a_norm_never_grows_and_the_mean_is_the_least(values: list[float], value: float):
    norms = _after(ON, values)
    limit = ON.limit(norms, value)
    assert limit <= value
    if limit < value:
        most = norms.mean + ON.threshold * math.sqrt(norms.variance)
        assert norms.mean <= limit <= most * (1 + 1e-9)


def test_what_is_disabled_does_nothing():
    assert _after(ZClip(), [1.0] * 50) == Norms()
    assert ZClip().limit(Norms(50, 1.0, 0.0), 100.0) == 100.0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_never_enters(bad: float):
    with pytest.raises(AssertionError):
        ON.watch(Norms(), bad)


@pytest.mark.parametrize(
    "wrong", [{"ema": 1.0}, {"threshold": 0.0}, {"warmup_steps": 1}, {"threshold": math.inf}]
)
def test_impossible_settings_are_refused(wrong: dict):
    with pytest.raises(ValidationError):
        ZClip(**wrong)

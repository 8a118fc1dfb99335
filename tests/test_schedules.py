"""Schedules are pure functions; what matters is where they start and end and that they never jump
the wrong way, for every length of stage a user may ask for."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bitray.schedules import DistillationSchedule, LearningRateSchedule, StrengthWarmup, ramp

TOTALS = st.integers(1, 5000)
SHAPES = st.sampled_from(["linear", "cosine"])
EPS = 1e-12


@settings(deadline=None)
@given(st.sampled_from(["linear", "cosine", "step"]), st.floats(-2, 3), st.floats(-2, 3))
def test_a_ramp_rises_from_0_to_1(kind, a, b):
    low, high = ramp(kind, min(a, b)), ramp(kind, max(a, b))
    assert 0 <= low <= high + EPS
    assert high <= 1
    assert ramp(kind, 0.0) == 0
    assert ramp(kind, 1.0) == 1


def test_ramps_have_their_shapes():
    assert ramp("linear", 0.25) == 0.25
    assert ramp("cosine", 0.25) == pytest.approx((1 - math.cos(math.pi / 4)) / 2)
    assert ramp("cosine", 0.5) == pytest.approx(0.5)
    assert ramp("step", 0.999) == 0


# ---- strength of quantising


@settings(deadline=None)
@given(TOTALS, st.none() | st.integers(0, 6000), SHAPES, st.floats(0, 1), st.floats(0, 1))
def test_strength_rises_from_min_to_exactly_max(total, warmup, schedule, a, b):
    low, high = min(a, b), max(a, b)
    warmup_settings = StrengthWarmup(warmup_steps=warmup, schedule=schedule, min=low, max=high)
    length = warmup_settings.effective_warmup(total)
    values = [
        warmup_settings.strength(s, total) for s in range(0, length + 3, max(1, length // 50))
    ]
    assert values[0] == (low if length else high)
    assert all(low <= v <= high for v in values)
    assert all(x <= y + EPS for x, y in itertools.pairwise(values))
    # exactly: `strength == 1` selects the integer kernel, 0.9999999 would not
    assert warmup_settings.strength(length, total) == high


@pytest.mark.parametrize(
    ("total", "expected"), [(100_000, 1000), (4000, 1000), (2000, 500), (90, 22), (3, 0)]
)
def test_the_default_warmup_is_1000_steps_or_a_quarter_of_a_shorter_stage(total, expected):
    assert StrengthWarmup().effective_warmup(total) == expected


def test_strength_values():
    linear = StrengthWarmup(warmup_steps=10, min=0.2, max=0.7)
    assert linear.strength(5, 100) == pytest.approx(0.45)
    cosine = StrengthWarmup(warmup_steps=10, schedule="cosine")
    assert cosine.strength(3, 100) == pytest.approx((1 - math.cos(0.3 * math.pi)) / 2)


def test_no_warmup_means_full_from_step_0():
    assert StrengthWarmup(warmup_steps=0).strength(0, 100) == 1
    assert StrengthWarmup(enabled=False, max=0.5).strength(0, 100) == 1


def test_a_falling_strength_is_refused():
    with pytest.raises(ValidationError, match="min"):
        StrengthWarmup(min=0.8, max=0.2)


# ---- learning rate

SCHEDULES = st.builds(
    LearningRateSchedule,
    type=st.sampled_from(["wsd", "cosine", "linear", "constant"]),
    warmup_steps=st.none() | st.integers(0, 2000),
    decay_ratio=st.floats(0, 1),
    decay=SHAPES,
    min_ratio=st.floats(0, 1),
)


@settings(deadline=None)
@given(SCHEDULES, TOTALS)
def test_learning_rate_is_bounded_and_rises_then_falls(schedule, total):
    steps = range(0, total + 3, max(1, total // 200))
    values = [schedule.factor(s, total) for s in steps]
    warmup = schedule.effective_warmup(total)
    assert all(0 <= v <= 1 for v in values)
    # no step is wasted at a rate of 0, which neither the first nor the last one may have
    if schedule.min_ratio > 0 or schedule.type != "wsd":
        assert schedule.factor(0, total) > 0
    rises = [v for s, v in zip(steps, values, strict=True) if s < warmup]
    falls = [v for s, v in zip(steps, values, strict=True) if s >= warmup]
    assert rises == sorted(rises)
    assert all(x >= y - EPS for x, y in itertools.pairwise(falls))


@settings(deadline=None)
@given(SCHEDULES, TOTALS)
def test_learning_rate_endpoints(schedule, total):
    warmup = schedule.effective_warmup(total)
    if warmup:
        assert schedule.factor(0, total) == pytest.approx(1 / warmup)
        assert schedule.factor(warmup - 1, total) == 1
    never = schedule.type == "wsd" and round(schedule.decay_ratio * total) == 0
    end = 1.0 if schedule.type == "constant" or never else schedule.min_ratio
    assert schedule.factor(total, total) == pytest.approx(end)
    assert schedule.factor(total + 100, total) == pytest.approx(end)


@settings(deadline=None)
@given(TOTALS, st.integers(0, 10_000))
def test_warmup_takes_a_tenth_at_most_and_says_when_it_was_cut(total, asked):
    schedule = LearningRateSchedule(warmup_steps=asked)
    warmup = schedule.effective_warmup(total)
    assert warmup <= 0.1 * total
    assert warmup == asked or warmup == total // 10
    notice = schedule.notice(total)
    assert (notice is None) == (warmup == asked)
    if notice:
        assert str(asked) in notice
        assert str(warmup) in notice


def test_nobody_is_told_of_the_default_being_cut():
    assert LearningRateSchedule().effective_warmup(50) == 5
    assert LearningRateSchedule().notice(50) is None


def test_wsd_is_stable_then_decays_over_the_last_part():
    wsd = LearningRateSchedule(warmup_steps=0, decay_ratio=0.2, min_ratio=0.1)
    assert [wsd.factor(s, 100) for s in (0, 50, 80)] == [1, 1, 1]
    assert wsd.factor(90, 100) == pytest.approx(0.55)
    cosine = LearningRateSchedule(warmup_steps=0, decay_ratio=0.2, decay="cosine")
    assert cosine.factor(85, 100) == pytest.approx((1 + math.cos(math.pi / 4)) / 2)


def test_cosine_and_linear_decay_from_the_end_of_the_warmup():
    cosine = LearningRateSchedule(type="cosine", warmup_steps=10)
    assert cosine.factor(10, 110) == 1
    assert cosine.factor(60, 110) == pytest.approx(0.5)
    linear = LearningRateSchedule(type="linear", warmup_steps=10, min_ratio=0.2)
    assert linear.factor(60, 110) == pytest.approx(0.6)


# ---- share of layer distillation


@settings(deadline=None)
@given(st.sampled_from(["constant", "linear", "cosine"]), st.floats(0, 1), TOTALS, st.floats(0, 1))
def test_distillation_is_held_then_falls_to_0(kind, hold, total, start):
    schedule = DistillationSchedule(type=kind, hold=hold)
    values = [schedule.share(s, total, start) for s in range(0, total + 1, max(1, total // 100))]
    assert all(0 <= v <= start for v in values)
    assert all(x >= y - EPS for x, y in itertools.pairwise(values))
    assert schedule.share(math.floor(hold * total), total, start) == pytest.approx(start)
    held = kind == "constant" or hold == 1
    assert schedule.share(total, total, start) == (start if held else pytest.approx(0, abs=1e-9))


def test_distillation_shapes():
    linear = DistillationSchedule(type="linear", hold=0.5)
    assert linear.share(75, 100, 0.5) == pytest.approx(0.25)
    cosine = DistillationSchedule(type="cosine", hold=0.0)
    assert cosine.share(25, 100, 0.5) == pytest.approx(0.25 * (1 + math.cos(math.pi / 4)))

"""Schedules are pure functions; what matters is where they start and end and that they never jump
the wrong way, for every length of stage a user may ask for."""

import itertools
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from bitray.schedules import (
    ActivationSparsity,
    Curriculum,
    DistillationSchedule,
    LearningRateSchedule,
    SaliencyCurriculum,
    StrengthWarmup,
    ramp,
)

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


# ---- saliency and sparse activations


@settings(deadline=None)
@given(TOTALS, st.none() | st.integers(0, 6000), SHAPES, st.floats(0, 1), st.floats(0, 1))
def test_saliency_is_held_and_then_falls_to_exactly_its_end(total, warmup, kind, a, b):
    high, low = max(a, b), min(a, b)
    made = SaliencyCurriculum(
        initial_k=high, final_k=low, schedule_type=kind, warmup_steps=warmup, enabled=True
    )
    held = min(1000, total // 4) if warmup is None else warmup
    values = [made.k(s, total) for s in range(0, total, max(1, total // 50))]
    assert all(low <= v <= high + EPS for v in values)
    assert all(x >= y - EPS for x, y in itertools.pairwise(values))
    assert made.k(held, total) == pytest.approx(high) or held >= total - 1
    if held < total - 1:
        assert made.k(total - 1, total) == made.k(total + 5, total) == low


def test_saliency_values():
    linear = SaliencyCurriculum(warmup_steps=10, schedule_type="linear")
    assert linear.k(10, 111) == 0.1
    assert linear.k(35, 111) == pytest.approx(0.075)
    cosine = SaliencyCurriculum(warmup_steps=10)
    assert cosine.k(35, 111) == pytest.approx(0.1 * (1 + math.cos(math.pi / 4)) / 2)
    assert SaliencyCurriculum().k(999, 1000) == 0
    with pytest.raises(ValidationError, match="final_k"):
        SaliencyCurriculum(initial_k=0.1, final_k=0.2)


def test_so_many_activations_are_kept():
    topk = ActivationSparsity(warmup={"warmup_steps": 1000})
    kept = [topk.kept(2560, step, 5000) for step in (0, 500, 999, 1000, 4000)]
    assert kept == [2560, math.floor(0.695 * 2560), math.floor((1 - 0.60939) * 2560), 998, 998]
    assert topk.kept(1, 4000, 5000) == topk.kept(2, 4000, 5000) == 1
    block = ActivationSparsity(mode="block", n=2, m=8, warmup={"warmup_steps": 6})
    assert [block.kept(8, step, 100) for step in range(8)] == [8, 7, 6, 5, 4, 3, 2, 2]
    assert ActivationSparsity().kept(100, 25, 100) == ActivationSparsity().kept(100, 99, 100) == 39
    assert ActivationSparsity(n=4, m=4, mode="block").kept(4, 9, 9) == 4


def test_more_than_all_cannot_be_kept():
    with pytest.raises(ValidationError, match=r"n \(5\) of every m \(4\)"):
        ActivationSparsity(mode="block", n=5, m=4)


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


# ---- phases

BASE = [
    {"name": "warmup", "until": 0.1, "weights": {"ce": 1, "dlm": 0}},
    {"name": "dlm_ramp", "until": 0.3, "weights": {"ce": 1, "dlm": 0.3}},
    {"name": "main", "until": 0.8, "weights": {"dlm": 0.5}},
    {"name": "dlm_focus", "until": 1.0, "weights": {"ce": 0.5, "dlm": 1}},
]
OWN = {"ce": 1.0, "dlm": 0.7, "other": 0.25}


def _phases(interpolation: str) -> Curriculum:
    return Curriculum.model_validate({"interpolation": interpolation, "phases": BASE})


def test_phases_switch_at_their_share_of_the_stage_and_leave_alone_what_they_do_not_name():
    found = [_phases("step").weights(OWN, step, 20) for step in range(20)]
    assert [each["dlm"] for each in found] == [0] * 2 + [0.3] * 4 + [0.5] * 10 + [1] * 4
    assert [each["ce"] for each in found] == [1] * 16 + [0.5] * 4
    assert {each["other"] for each in found} == {0.25}
    assert _phases("step").weights(OWN, 25, 20) == found[-1]
    assert Curriculum().weights(OWN, 3, 20) == OWN


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_phases_begin_where_the_last_one_ended_and_reach_their_own_weights(kind):
    phases = _phases(kind)
    at = {step: phases.weights(OWN, step, 1000)["dlm"] for step in range(1000)}
    assert at[0] == at[99] == at[100] == 0
    for begin, end, low, high in ((100, 300, 0, 0.3), (300, 800, 0.3, 0.5), (800, 1000, 0.5, 1)):
        quarter = 0.25 if kind == "linear" else (1 - math.cos(math.pi / 4)) / 2
        assert at[begin] == pytest.approx(low)
        assert at[begin + (end - begin) // 4] == pytest.approx(low + quarter * (high - low))
        assert at[(begin + end) // 2] == pytest.approx((low + high) / 2)
        assert at[end - 1] == pytest.approx(high, abs=0.005)


@settings(deadline=None)
@given(
    st.lists(st.floats(0.001, 0.999), max_size=4, unique=True),
    st.data(),
    st.sampled_from(["step", "linear", "cosine"]),
    st.integers(1, 60),
)
def test_turns_tell_of_every_step_which_weights_are_above_0(ends, data, kind, total):
    weight = st.sampled_from([0.0, 0.0, 0.5, 1.0])
    phases = [
        {"until": end, "weights": {"a": data.draw(weight), "b": data.draw(weight)}}
        for end in [*sorted(ends), 1.0]
    ]
    made = Curriculum.model_validate({"interpolation": kind, "phases": phases})

    def above(steps):
        found = [made.weights({"a": 0.0, "b": 0.0}, step, total) for step in steps]
        return {frozenset(name for name, weight in each.items() if weight > 0) for each in found}

    some, every = above(made.turns(total)), above(range(total))
    assert some == every

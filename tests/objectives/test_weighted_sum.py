"""Which objectives count, with which weight, at which step."""

import pytest
from pydantic import ValidationError

from bitray.objectives import (
    ContinuePretrain,
    HiddenDistill,
    LogitsDistill,
    Objectives,
    combined_weights,
)
from bitray.schedules import Curriculum, DistillationSchedule

CONSTANT = DistillationSchedule()
STAGE_1_9 = Objectives(
    continue_pretrain=ContinuePretrain(weight=0.5),
    hidden_distill=HiddenDistill(),
    logits_distill=LogitsDistill(weight=0.5, temperature=1.0),
)


def test_by_default_there_is_cross_entropy_alone():
    assert Objectives().active(0, 10) == {"continue_pretrain": 1.0}


def test_a_path_under_an_absent_objective_creates_it():
    tree = {"logits_distill": {"weight": 0.5}, "continue_pretrain": {"label_smoothing": 0.1}}
    objectives = Objectives.model_validate(tree)
    assert objectives.active(0, 10) == {"continue_pretrain": 1.0, "logits_distill": 0.5}


def test_weight_0_is_as_good_as_absent():
    objectives = Objectives(continue_pretrain=None, logits_distill=LogitsDistill(weight=0.0))
    assert objectives.active(0, 10) == {}
    assert combined_weights(objectives, 0.5, CONSTANT, 0, 10) == {}


def test_unknown_objectives_are_refused():
    with pytest.raises(ValidationError, match="kl_divergence"):
        Objectives.model_validate({"kl_divergence": {"weight": 1.0}})


def test_without_the_combination_weights_are_as_given():
    weights = combined_weights(STAGE_1_9, None, CONSTANT, 3, 10)
    assert weights == {"continue_pretrain": 0.5, "hidden_distill": 1.0, "logits_distill": 0.5}


def test_the_stage_1_9_combination():
    """(1-a) * hidden + a * (0.5 CE + 0.5 KL)"""
    weights = combined_weights(STAGE_1_9, 0.3, CONSTANT, 9, 10)
    assert weights == pytest.approx(
        {"continue_pretrain": 0.15, "hidden_distill": 0.7, "logits_distill": 0.15}
    )


@pytest.mark.parametrize("kind", ["linear", "cosine"])
def test_distillation_gives_way_to_language_modelling(kind):
    schedule = DistillationSchedule(type=kind, hold=0.5)
    start = combined_weights(STAGE_1_9, 0.5, schedule, 50, 100)
    assert start == pytest.approx(
        {"continue_pretrain": 0.25, "hidden_distill": 0.5, "logits_distill": 0.25}
    )
    halfway = combined_weights(STAGE_1_9, 0.5, schedule, 75, 100)
    assert halfway["hidden_distill"] == pytest.approx(0.25)
    assert halfway["continue_pretrain"] == pytest.approx(0.375)
    # gone, not merely 0: a weight of 0 must cost no capture of states
    assert combined_weights(STAGE_1_9, 0.5, schedule, 100, 100) == pytest.approx(
        {"continue_pretrain": 0.5, "logits_distill": 0.5}
    )


@pytest.mark.parametrize(
    ("a", "left"), [(0.0, {"hidden_distill"}), (1.0, {"continue_pretrain", "logits_distill"})]
)
def test_the_ends_of_the_combination_drop_what_has_no_weight(a, left):
    assert set(combined_weights(STAGE_1_9, a, CONSTANT, 0, 10)) == left


def test_phases_weigh_what_is_combined_and_an_own_weight_of_0_may_rise():
    phases = [
        {"until": 0.5, "weights": {"continue_pretrain": 1.0, "hidden_distill": 0.0}},
        {"until": 1.0, "weights": {"logits_distill": 2.0}},
    ]
    given = STAGE_1_9.model_copy(update={"logits_distill": LogitsDistill(weight=0.0)})
    curriculum = Curriculum.model_validate({"phases": phases})
    first, second = (
        combined_weights(given, 0.4, CONSTANT, s, 10, curriculum=curriculum) for s in (0, 5)
    )
    assert first == pytest.approx({"continue_pretrain": 0.4})
    assert second == pytest.approx(
        {"continue_pretrain": 0.2, "hidden_distill": 0.6, "logits_distill": 0.8}
    )

"""The loss as a weighted sum of named objectives, and how the weights follow the step."""

from collections.abc import Iterator

from bitray.objectives.base import Objective
from bitray.objectives.continue_pretrain import ContinuePretrain
from bitray.objectives.hidden_distill import HiddenDistill
from bitray.objectives.logits_distill import LogitsDistill
from bitray.schedules import Curriculum, DistillationSchedule
from bitray.settings import Settings


class Objectives(Settings):
    """One optional field per objective; absent or of weight 0, it costs nothing at all."""

    continue_pretrain: ContinuePretrain | None = ContinuePretrain()
    hidden_distill: HiddenDistill | None = None
    logits_distill: LogitsDistill | None = None

    def named(self) -> Iterator[tuple[str, Objective]]:
        """Those that count, in the order of the fields."""
        for name in type(self).model_fields:
            objective = getattr(self, name)
            if objective is not None and objective.weight > 0:
                yield name, objective

    def active(
        self, step: int, total_steps: int, curriculum: Curriculum | None = None
    ) -> dict[str, float]:
        """Weight at `step` of every objective that counts there."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        own = {name: each.weight for name, each in given.items() if each is not None}
        weights = own if curriculum is None else curriculum.weights(own, step, total_steps)
        return {name: weight for name, weight in weights.items() if weight > 0 and name in own}

    @property
    def needs_teacher(self) -> bool:
        """Whether any objective that counts compares the student with a teacher."""
        return any(objective.needs_teacher for _, objective in self.named())


def combined_weights(
    objectives: Objectives,
    lm_loss_weight: float | None,
    schedule: DistillationSchedule,
    step: int,
    total_steps: int,
    *,
    curriculum: Curriculum | None = None,
) -> dict[str, float]:
    """Weights at `step` of `(1-a) * layer objectives + a * head objectives`, those above 0 only.

    `a` starts at `lm_loss_weight`; the schedule lowers `1-a` towards 0. None: no such combination.
    """
    weights = objectives.active(step, total_steps, curriculum)
    if lm_loss_weight is not None:
        layers = schedule.share(step, total_steps, 1 - lm_loss_weight)
        part = {"layer": layers, "head": 1 - layers}
        weights = {name: w * part[getattr(objectives, name).kind] for name, w in weights.items()}
    return {name: weight for name, weight in weights.items() if weight > 0}

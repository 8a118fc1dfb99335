"""The loss as a weighted sum of named objectives, and how the weights follow the step."""

from pydantic import model_validator

from bitray.objectives.attention_distill import AttentionDistill
from bitray.objectives.continue_pretrain import ContinuePretrain
from bitray.objectives.dlm import DLM
from bitray.objectives.hidden_distill import HiddenDistill
from bitray.objectives.logits_distill import LogitsDistill
from bitray.objectives.moe import MoE
from bitray.objectives.tcs_distill import TCSDistill
from bitray.schedules import Curriculum, DistillationSchedule
from bitray.settings import Settings


class Objectives(Settings):
    """One optional field per objective; absent or of weight 0, it costs nothing at all."""

    continue_pretrain: ContinuePretrain | None = ContinuePretrain()
    hidden_distill: HiddenDistill | None = None
    logits_distill: LogitsDistill | None = None
    attention_distill: AttentionDistill | None = None
    dlm: DLM | None = None
    tcs_distill: TCSDistill | None = None
    moe: MoE | None = None

    @model_validator(mode="after")
    def _views_are_there(self) -> "Objectives":
        for name in type(self).model_fields:
            view_of = getattr(getattr(self, name), "view_of", None)
            if view_of and getattr(self, view_of) is None:
                raise ValueError(
                    f"{name} compares what {view_of} masks, which is not there; give "
                    f"{view_of} too, with weight 0 if it is not to be learnt itself"
                )
        return self

    def active(
        self, step: int, total_steps: int, curriculum: Curriculum | None = None
    ) -> dict[str, float]:
        """Weight at `step` of every objective that counts there."""
        given = {name: getattr(self, name) for name in type(self).model_fields}
        own = {name: each.weight for name, each in given.items() if each is not None}
        weights = own if curriculum is None else curriculum.weights(own, step, total_steps)
        return {name: weight for name, weight in weights.items() if weight > 0 and name in own}


def combined_weights(
    objectives: Objectives,
    lm_loss_weight: float | None,
    schedule: DistillationSchedule,
    step: int,
    total_steps: int,
    *,
    curriculum: Curriculum | None = None,
) -> dict[str, float]:
    """Weights at `step` of `(1-a) * layer and attention + a * head objectives`, those above 0 only;
    balance of routers is beside that.

    `a` starts at `lm_loss_weight`; the schedule lowers `1-a` towards 0. None: no such combination.
    """
    weights = objectives.active(step, total_steps, curriculum)
    if lm_loss_weight is not None:
        layers = schedule.share(step, total_steps, 1 - lm_loss_weight)
        part = {"layer": layers, "attention": layers, "head": 1 - layers, "router": 1.0}
        weights = {name: w * part[getattr(objectives, name).kind] for name, w in weights.items()}
    return {name: weight for name, weight in weights.items() if weight > 0}

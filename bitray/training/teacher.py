"""Teachers that live beside the student, in the same process."""

from typing import Protocol, runtime_checkable

import torch
from transformers import PreTrainedModel

from bitray.models.batch import Batch
from bitray.models.losses import TeacherOutput, run_teacher


@runtime_checkable
class Teacher(Protocol):
    """Answers a batch with what the objectives compare the student to."""

    def __call__(
        self, batch: Batch, layers: bool, attention: int | None = None
    ) -> TeacherOutput: ...


class InProcessTeacher:
    """A frozen model, whole on every worker."""

    def __init__(self, model: PreTrainedModel, autocast: torch.autocast) -> None:
        assert not any(p.requires_grad for p in model.parameters()), "a teacher is frozen"
        self.model, self.autocast = model.eval(), autocast

    def __call__(self, batch: Batch, layers: bool, attention: int | None = None) -> TeacherOutput:
        with self.autocast:
            return run_teacher(self.model, batch, layers, attention)

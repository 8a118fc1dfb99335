"""Schedules as pure functions of the optimizer step: nothing to checkpoint or to desynchronise.

Steps count from 0; `total_steps` is the length of the stage. Everything here is plain arithmetic.
"""

import math
from typing import Literal

from pydantic import Field, model_validator

from bitray.settings import Settings

WARMUP_LIMIT = 0.1
"""The largest share of a stage that a learning-rate warm-up may take."""


def ramp(kind: Literal["linear", "cosine", "step"], t: float) -> float:
    """From 0 at `t <= 0` up to 1 at `t >= 1`; `step` jumps at 1, `cosine` is (1-cos(pi t))/2."""
    if t >= 1:
        return 1.0
    if t <= 0 or kind == "step":
        return 0.0
    return t if kind == "linear" else (1 - math.cos(math.pi * t)) / 2


class StrengthWarmup(Settings):
    """Strength of quantisation over a stage: from `min` to `max`, then `max`."""

    enabled: bool = True
    """False: fully quantised from the first step."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """None: 1000, or a quarter of the stage where that is shorter. 0: `max` from the first step."""
    schedule: Literal["linear", "cosine"] = "linear"
    min: float = Field(default=0.0, ge=0, le=1)
    max: float = Field(default=1.0, ge=0, le=1)

    @model_validator(mode="after")
    def _rises(self) -> "StrengthWarmup":
        if self.min > self.max:
            raise ValueError(f"min ({self.min}) is above max ({self.max}); swap them")
        return self

    def effective_warmup(self, total_steps: int) -> int:
        """Steps until `max` is reached."""
        return min(1000, total_steps // 4) if self.warmup_steps is None else self.warmup_steps

    def strength(self, step: int, total_steps: int) -> float:
        """Strength at `step`; from the end of the warm-up on exactly `max`."""
        if not self.enabled:
            return 1.0
        length = self.effective_warmup(total_steps)
        if step >= length:  # not left to rounding: a kernel is chosen by `strength == 1`
            return self.max
        return min(self.max, self.min + (self.max - self.min) * ramp(self.schedule, step / length))


class LearningRateSchedule(Settings):
    """Learning rate as a factor of each parameter group's own peak."""

    type: Literal["wsd", "cosine", "linear", "constant"] = "wsd"
    """`wsd`: warm-up, stable, decay. `cosine` and `linear` decay from the end of the warm-up."""
    warmup_steps: int | None = Field(default=None, ge=0)
    """Cut to 10 % of the stage. None: 100, or those 10 %."""
    decay_ratio: float = Field(default=0.2, ge=0, le=1)
    """Share of the stage in which `wsd` decays."""
    decay: Literal["linear", "cosine"] = "linear"
    """Shape of the decay of `wsd`."""
    min_ratio: float = Field(default=0.0, ge=0, le=1)
    """What is left at the end, as a share of the peak."""

    def effective_warmup(self, total_steps: int) -> int:
        """Steps of warm-up: what was asked for, at most a tenth of the stage."""
        asked = 100 if self.warmup_steps is None else self.warmup_steps
        return min(asked, math.floor(WARMUP_LIMIT * total_steps))

    def notice(self, total_steps: int) -> str | None:
        """One sentence if the warm-up that was asked for is cut, to be said once."""
        cut = self.effective_warmup(total_steps)
        if self.warmup_steps is None or self.warmup_steps == cut:
            return None
        return (
            f"learning-rate warm-up cut from {self.warmup_steps} to {cut} steps, "
            f"10 % of {total_steps}"
        )

    def factor(self, step: int, total_steps: int) -> float:
        """Factor at `step`: (0, 1] during warm-up, 1 at its end, `min_ratio` at `total_steps`.

        Step `s` of a warm-up over W steps has (s+1)/W, so that no step is spent at a rate of 0;
        for the same reason `min_ratio` is where the step after the last one would be.
        """
        warmup = self.effective_warmup(total_steps)
        if step < warmup:
            return (step + 1) / warmup
        if self.type == "constant":
            return 1.0
        start = warmup
        if self.type == "wsd":
            start = max(warmup, total_steps - round(self.decay_ratio * total_steps))
        shape = self.decay if self.type == "wsd" else self.type
        if start >= total_steps:
            return 1.0
        t = (step - start) / (total_steps - start)
        return 1 - (1 - self.min_ratio) * ramp(shape, t)


class DistillationSchedule(Settings):
    """Share of layer-wise distillation in a loss that also has language-modelling terms."""

    type: Literal["constant", "linear", "cosine"] = "constant"
    hold: float = Field(default=0.5, ge=0, le=1)
    """Share of the stage during which the start value is kept; `constant` keeps it to the end."""

    def share(self, step: int, total_steps: int, start: float) -> float:
        """`start` while it is held, then falling to 0 at `total_steps`."""
        left = (1 - self.hold) * total_steps
        if self.type == "constant" or left == 0:
            return start
        return start * (1 - ramp(self.type, (step - self.hold * total_steps) / left))

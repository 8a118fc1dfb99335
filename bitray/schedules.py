"""Schedules as pure functions of the optimizer step: nothing to checkpoint or to desynchronise.

Steps count from 0; `total_steps` is the length of the stage. Everything here is plain arithmetic.
"""

import bisect
import itertools
import math
from collections.abc import Mapping
from typing import Annotated, Literal

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


def _length(warmup_steps: int | None, total_steps: int) -> int:
    """Steps of a warm-up: what was asked for, or 1000, or a quarter of a shorter stage."""
    return min(1000, total_steps // 4) if warmup_steps is None else warmup_steps


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
        return _length(self.warmup_steps, total_steps)

    def strength(self, step: int, total_steps: int) -> float:
        """Strength at `step`; from the end of the warm-up on exactly `max`."""
        if not self.enabled:
            return 1.0
        length = self.effective_warmup(total_steps)
        if step >= length:  # not left to rounding: a kernel is chosen by `strength == 1`
            return self.max
        return min(self.max, self.min + (self.max - self.min) * ramp(self.schedule, step / length))


class SaliencyCurriculum(Settings):
    """A share k of each layer's input columns, those of the largest weights, stays unquantised
    while the stage is trained. Evaluation and exports quantise every column."""

    enabled: bool = False
    initial_k: float = Field(default=0.1, ge=0, le=1)
    final_k: float = Field(default=0.0, ge=0, le=1)
    schedule_type: Literal["linear", "cosine"] = "cosine"
    warmup_steps: int | None = Field(default=None, ge=0)
    """`initial_k` so long, then `final_k` by the last step. None: 1000, or a quarter of the stage
    where that is shorter."""
    ema_decay: float = Field(default=0.99, ge=0, lt=1)
    """Of the running range of each column, which begins with that of the weights."""
    update_interval: int = Field(default=10, ge=1)
    """Steps between updates of it."""

    @model_validator(mode="after")
    def _falls(self) -> "SaliencyCurriculum":
        if self.final_k > self.initial_k:
            raise ValueError(
                f"final_k ({self.final_k}) is above initial_k ({self.initial_k}); swap them"
            )
        return self

    def k(self, step: int, total_steps: int) -> float:
        """Share of the columns at a step; at the last one exactly `final_k`."""
        start = _length(self.warmup_steps, total_steps)
        t = (step - start) / max(1, total_steps - 1 - start)
        left = 1 - ramp(self.schedule_type, t)
        return self.final_k + (self.initial_k - self.final_k) * left


class SparsityWarmup(Settings):
    """How sparsity begins."""

    warmup_steps: int | None = Field(default=None, ge=0)
    """Linear from none. None: 1000, or a quarter of the stage where that is shorter."""


class ActivationSparsity(Settings):
    """Q-Sparse (arXiv 2407.10969): the smallest activations of a token are zeros while the stage is
    trained. Engines that run exports keep all of them, and so do evaluation and generation."""

    enabled: bool = False
    mode: Literal["topk", "block"] = "topk"
    """`topk`: of the whole token; `block`: `n` of every `m` consecutive ones."""
    sparsity_ratio: float = Field(default=0.61, ge=0, lt=1)
    """Share of zeros that `topk` ends at."""
    n: int = Field(default=2, ge=1)
    m: int = Field(default=4, ge=1)
    warmup: SparsityWarmup = SparsityWarmup()

    @model_validator(mode="after")
    def _has_so_many(self) -> "ActivationSparsity":
        if self.n > self.m:
            raise ValueError(f"n ({self.n}) of every m ({self.m}) activations cannot be kept")
        return self

    def kept(self, size: int, step: int, total_steps: int) -> int:
        """Activations kept at a step of a group of `size`."""
        length = _length(self.warmup.warmup_steps, total_steps)
        part = 1.0 if step >= length else ramp("linear", step / length)
        if self.mode == "block":
            return math.floor(self.m - (self.m - self.n) * part)
        return max(1, math.floor((1 - self.sparsity_ratio * part) * size))


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


class Phase(Settings):
    """A part of a stage with weights of its own; what it does not speak of stays as it is set."""

    name: str | None = None
    until: float = Field(gt=0, le=1)
    """Share of the stage's steps at which it ends."""
    weights: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """By objective; one that is not named keeps its own weight."""
    mixture: dict[str, float] | None = None
    """Token shares by source, relative to each other; a source that is not named gets none. None:
    the weights of the data."""


class Curriculum(Settings):
    """Phases of a stage: weights of the objectives, and mixtures of the sources."""

    interpolation: Literal["step", "linear", "cosine"] = "step"
    """How weights of objectives go from those of a phase to those of the next: at once where it
    begins, or over the whole of it, so that they are reached at its end. Mixtures always switch."""
    phases: tuple[Phase, ...] = ()

    @model_validator(mode="after")
    def _follow_each_other(self) -> "Curriculum":
        ends = [phase.until for phase in self.phases]
        if ends and (ends[-1] != 1 or any(a >= b for a, b in itertools.pairwise(ends))):
            raise ValueError(
                f"phases end at {', '.join(f'{end:g}' for end in ends)} of the stage; each `until` "
                "has to be above the one before it, and the last one 1.0"
            )
        return self

    def ends(self, total_steps: int) -> list[int]:
        """The step before which each phase ends."""
        return [round(phase.until * total_steps) for phase in self.phases]

    def weights(self, own: Mapping[str, float], step: int, total_steps: int) -> dict[str, float]:
        """Weights at a step of objectives whose own weights are given, 0 included."""
        if not self.phases:
            return dict(own)
        ends = self.ends(total_steps)
        number = min(bisect.bisect_right(ends, step), len(ends) - 1)
        here = {**own, **self.phases[number].weights}
        if self.interpolation == "step" or not number:
            return here
        begin = ends[number - 1]
        t = ramp(self.interpolation, (step - begin) / max(1, ends[number] - begin))
        before = {**own, **self.phases[number - 1].weights}
        return {name: before[name] + (here[name] - before[name]) * t for name in here}

    def turns(self, total_steps: int) -> list[int]:
        """Steps that tell of all others which weights are above 0: those around every border."""
        borders = (0, *self.ends(total_steps))
        around = {border + more for border in borders for more in (-1, 0, 1)}
        return sorted(step for step in around if 0 <= step < total_steps)

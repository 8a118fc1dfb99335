"""Settings of one stage of training, and the sizes that follow from them."""

import itertools
from typing import Literal

from pydantic import Field, model_validator

from bitray.data.settings import MixturePhase
from bitray.objectives import Objectives
from bitray.optim import AdamW, Optimizer
from bitray.schedules import DistillationSchedule, LearningRateSchedule, StrengthWarmup
from bitray.settings import Settings


class Packing(Settings):
    """Several documents in one row, or one document a row."""

    enabled: bool = True


class TorchCompile(Settings):
    """Compile each decoder block."""

    enabled: bool = False
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "default"
    )
    fullgraph: bool = False


class Resume(Settings):
    """What is taken over from a checkpoint, and from which one."""

    checkpoint_path: str | None = None
    """Start from this checkpoint; else from the newest complete one of the stage itself."""
    load_optimizer_state: bool = True
    load_scheduler_state: bool = True
    """The position in the schedules, which is the step counter's own place in them."""
    load_training_state: bool = True
    load_data_state: bool = True
    strict_model_load: bool = True


class TrainingSettings(Settings):
    """One stage. A step is `gradient_accumulation_steps` micro-batches of `batch_size` rows, dealt
    to however many workers there are, so that the global batch does not depend on their number."""

    max_steps: int | None = Field(default=None, ge=0)
    total_tokens: int | None = Field(default=None, ge=1)
    """Length of the stage in tokens, where `max_steps` is not given."""
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=8, ge=1)
    max_seq_length: int = Field(default=1024, ge=8)
    packing: Packing = Packing()
    seed: int = 0
    mixture_phases: tuple[MixturePhase, ...] = ()
    """A curriculum: weights of the sources by share of the stage; none: those of the data."""

    objectives: Objectives = Objectives()
    lm_loss_weight: float | None = Field(default=None, ge=0, le=1)
    """`a` in `(1-a) * hidden + a * (CE and KL)`; None leaves the objectives' own weights."""
    distillation_schedule: DistillationSchedule = DistillationSchedule()

    optimizer: Optimizer = AdamW()
    schedule: LearningRateSchedule = LearningRateSchedule()
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    max_skipped_steps: int = Field(default=10, ge=1)
    """Stop after so many steps in a row with a gradient that is not finite."""
    lambda_warmup: StrengthWarmup = StrengthWarmup()

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 autocast over fp32 masters on GPUs, fp32 on CPUs."""
    tf32: bool = True
    activation_checkpointing: bool = False
    torch_compile: TorchCompile = TorchCompile()
    logits_chunk: int | None = Field(default=None, ge=1)
    """Tokens whose logits exist at a time; None: 256 on CPUs, 2048 on GPUs."""

    log_every: int = Field(default=10, ge=1)
    eval_every: int = Field(default=500, ge=1)
    eval_rows: int = Field(default=64, ge=1)
    """Held-out rows per domain of the evaluations during training."""
    save_every: int = Field(default=200, ge=1)
    keep_last: int = Field(default=5, ge=1)
    resume: Resume = Resume()

    @model_validator(mode="after")
    def _phases_follow_each_other(self) -> "TrainingSettings":
        ends = [phase.until for phase in self.mixture_phases]
        if ends and (ends[-1] != 1 or any(a >= b for a, b in itertools.pairwise(ends))):
            raise ValueError(
                f"mixture_phases end at {', '.join(f'{end:g}' for end in ends)} of the stage; each "
                "`until` has to be above the one before it, and the last one 1.0"
            )
        return self

    @property
    def rows_per_step(self) -> int:
        """Global batch, in rows."""
        return self.batch_size * self.gradient_accumulation_steps

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the stage."""
        if self.max_steps is not None:
            return self.max_steps
        assert self.total_tokens is not None
        return max(1, self.total_tokens // (self.rows_per_step * self.max_seq_length))

    def strength(self, step: int, initial: float) -> float:
        """Quantisation strength of a step in a stage whose predecessor ended at `initial`."""
        ramp = self.lambda_warmup.strength(step, self.total_steps)
        return max(initial, ramp)

"""Settings of one stage of training, and the sizes that follow from them."""

import math
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from bitray.nn import LowRank
from bitray.objectives import LogitsDistill, Objective, Objectives, combined_weights
from bitray.optim import AdamW, Optimizer, ZClip
from bitray.schedules import (
    ActivationSparsity,
    Curriculum,
    DistillationSchedule,
    LearningRateSchedule,
    SaliencyCurriculum,
    StrengthWarmup,
)
from bitray.settings import Settings, nearest
from bitray.training.fp8 import FP8
from bitray.training.plateau import EarlyStopping
from bitray.training.spikes import LossSpike


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
    """What is taken over from a checkpoint, and from which one. Workers that start again within an
    attempt at a run take over everything of what was written in it."""

    checkpoint_path: str | None = None
    """Start from this checkpoint; a stage that has one of its own already goes on from that."""
    load_optimizer_state: bool = True
    load_scheduler_state: bool = True
    """The position in the schedules, which is the step counter's own place in them."""
    load_training_state: bool = True
    """Without it the stage begins at its first step, and its data with it."""
    load_data_state: bool = True
    strict_model_load: bool = True

    @property
    def continues_data(self) -> bool:
        """Whether data go on where the checkpoint stands."""
        return self.load_training_state and self.load_data_state


class InfluenceSettings(Settings):
    """Remixing of the sources while training, by measured influence (`training.influence`)."""

    enabled: bool = False
    method: Literal["cosine", "datainf", "dot", "ado"] = "cosine"
    """What drives. Each of the first three logs what the others of them find; `ado` looks at losses
    alone, and needs no probes."""
    warmup_steps: int = Field(default=1000, ge=0)
    """The first decision: early gradients say the same of all sources."""
    update_interval: int = Field(default=5000, ge=1)
    """Steps between decisions; more where measuring would cost more than `budget`."""
    learning_rate: float = Field(default=0.2, gt=0, le=1)
    """How far weights go towards the optimum at a decision."""
    min_weight: float = Field(default=0.05, ge=0, le=1)
    max_weight: float = Field(default=0.60, gt=0, le=1)
    temperature: float = Field(default=0.5, gt=0)
    score_ema: float = Field(default=0.5, ge=0, lt=1)
    """Weight of the past in the running mean of scores."""
    lambda_val: float = Field(default=0.1, gt=0)
    """Damping of `datainf`, relative to the mean squared gradient."""
    probes: dict[str, Annotated[float, Field(ge=0, allow_inf_nan=False)]] = {}
    """Weight of each probe domain; empty: all alike."""
    probe_rows: int = Field(default=32, ge=1)
    """Held-out rows of each probe domain, the same ones at every decision."""
    groups: int = Field(default=4, ge=2)
    """Groups of rows of every source, whose scatter gives the standard error."""
    group_rows: int = Field(default=4, ge=1)
    """Rows of a group; other ones at every decision."""
    depth: float = Field(default=2 / 3, gt=0, le=1)
    """Share of the decoder layers, counted from the last, whose gradients are compared. Every
    worker keeps (probes + groups * sources) gradients of its shard of them, in fp32."""
    budget: float = Field(default=0.01, gt=0)
    """Rows that measuring may cost, relative to rows trained on."""

    @model_validator(mode="after")
    def _is_consistent(self) -> "InfluenceSettings":
        if self.min_weight > self.max_weight:
            raise ValueError(
                f"min_weight {self.min_weight} is above max_weight {self.max_weight}; swap them"
            )
        if self.probes and not sum(self.probes.values()):
            raise ValueError("the weights of all probes are 0, so nothing says what is better")
        return self

    def interval(self, probes: int, sources: int, rows_per_step: int) -> int:
        """Steps between decisions: a function of settings alone, never of measured time."""
        if self.method == "ado":
            return self.update_interval
        rows = probes * self.probe_rows + sources * self.groups * self.group_rows
        return max(self.update_interval, math.ceil(rows / (self.budget * rows_per_step)))

    def first(self, interval: int) -> int:
        """The step of the first decision; the very start has nothing to compare."""
        return self.warmup_steps or interval

    def updates(self, interval: int, steps: int) -> int:
        """Decisions in a stage of so many steps."""
        return max(0, (steps - self.first(interval)) // interval + 1)


class TrainingSettings(Settings):
    """One stage. A step is `gradient_accumulation_steps` micro-batches of `batch_size` rows, dealt
    to however many workers there are, so that the global batch does not depend on their number."""

    max_steps: int | None = Field(default=None, ge=0)
    total_tokens: int | None = Field(default=None, ge=1)
    """Length of the stage in tokens, where `max_steps` is not given."""
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation_steps: int = Field(default=8, ge=1)
    auto_batch_size: bool = False
    """Before the stage find the largest micro-batch that fits every worker, by trial; the global
    batch stays `batch_size * gradient_accumulation_steps`."""
    memory_limit_gb: float | None = Field(default=None, gt=0)
    """What a worker may take, for `auto_batch_size`. None: its GPU's memory, or on CPUs its share
    of what is free."""
    memory_margin: float = Field(default=0.1, ge=0, lt=1)
    """Share of it that is left free."""
    max_seq_length: int = Field(default=1024, ge=8)
    packing: Packing = Packing()
    seed: int = 0

    objectives: Objectives = Objectives()
    curriculum: Curriculum = Curriculum()
    """Phases of the stage: weights of the objectives, and mixtures of the sources."""
    lm_loss_weight: float | None = Field(default=None, ge=0, le=1)
    """`a` in `(1-a) * hidden + a * (CE and KL)`; None leaves the objectives' own weights."""
    distillation_schedule: DistillationSchedule = DistillationSchedule()

    optimizer: Optimizer = AdamW()
    """Another type begins with its own defaults, whatever the stage's preset says of AdamW."""
    schedule: LearningRateSchedule = LearningRateSchedule()
    max_grad_norm: float | None = Field(default=1.0, gt=0)
    zclip: ZClip = ZClip()
    loss_spike: LossSpike = LossSpike()
    max_skipped_steps: int = Field(default=10, ge=1)
    """Stop after so many steps in a row with a gradient that is not finite."""
    lambda_warmup: StrengthWarmup = StrengthWarmup()
    saliency_curriculum: SaliencyCurriculum = SaliencyCurriculum()
    activation_sparsity: ActivationSparsity = ActivationSparsity()

    lrc: LowRank | None = None
    """Low-rank corrections, which alone are trained then."""

    influence: InfluenceSettings = InfluenceSettings()

    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """`auto`: bf16 autocast over fp32 masters on GPUs, fp32 on CPUs."""
    tf32: bool = True
    activation_checkpointing: bool = False
    torch_compile: TorchCompile = TorchCompile()
    fp8: FP8 = FP8()
    int8_kernel: bool = False
    """Multiply the codes of ternary layers on GPUs' int8 tensor cores instead of as floats that
    hold them: the same integers, sooner."""
    attention: Literal["sdpa", "flex"] = "sdpa"
    """How the student attends: over dense masks, or (on GPUs) by blocks of what is seen."""
    logits_chunk: int | None = Field(default=None, ge=1)
    """Tokens whose logits exist at a time; None: 256 on CPUs, 2048 on GPUs."""

    log_every: int = Field(default=10, ge=1)
    grad_norms_every: int = Field(default=200, ge=1)
    """Steps between measurements of each objective's own gradient norm where there are several;
    one costs as much as a step for each of them, and leaves no trace in the training."""
    eval_every: int = Field(default=500, ge=1)
    eval_rows: int = Field(default=64, ge=1)
    """Held-out rows per domain of the evaluations during training."""
    save_every: int = Field(default=200, ge=1)
    keep_last: int = Field(default=5, ge=1)
    early_stopping: EarlyStopping = EarlyStopping()
    resume: Resume = Resume()

    @field_validator("curriculum")
    @classmethod
    def _weighs_objectives(cls, given: Curriculum) -> Curriculum:
        known = Objectives.model_fields
        for number, phase in enumerate(given.phases):
            for name in phase.weights:
                if name not in known:
                    raise ValueError(
                        f"phases.{number}.weights: there is no objective '{name}'"
                        f"{nearest(name, known)}; there are: {', '.join(known)}"
                    )
        return given

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

    def weights(self, step: int) -> dict[str, float]:
        """Weight at a step of every objective that counts there."""
        return combined_weights(
            self.objectives,
            self.lm_loss_weight,
            self.distillation_schedule,
            step,
            self.total_steps,
            curriculum=self.curriculum,
        )

    @property
    def turns(self) -> list[int]:
        """Steps among which every objective that ever counts does, and the first without any."""
        held = round(self.distillation_schedule.hold * self.total_steps)
        more = [step for step in (held, held + 1) if step < self.total_steps]
        return sorted({*self.curriculum.turns(self.total_steps), *more})

    @property
    def learnt(self) -> dict[str, Objective]:
        """The objectives that ever count."""
        names = {name for step in self.turns for name in self.weights(step)}
        return {name: getattr(self.objectives, name) for name in sorted(names)}

    @property
    def view_lengths(self) -> int:
        """How many times as wide as the rows the widest view is that the model ever sees."""
        makers = (each.view_of or name for name, each in self.learnt.items())
        return max((getattr(self.objectives, maker).lengths for maker in makers), default=1)

    @property
    def needs_teacher(self) -> bool:
        """Whether any objective that ever counts compares the student with a teacher."""
        return any(objective.needs_teacher for objective in self.learnt.values())

    @property
    def likeliest(self) -> dict[str, LogitsDistill]:
        """Those of them for which a teacher's likeliest tokens are enough."""
        every = self.learnt.items()
        return {name: each for name, each in every if isinstance(each, LogitsDistill)}

    @property
    def asked_at(self) -> float:
        """The temperature that a remote teacher is asked at: all of those have the same one."""
        (temperature,) = {each.temperature for each in self.likeliest.values()}
        return temperature

    @property
    def needs_mask_token(self) -> bool:
        """Whether any objective that ever counts masks tokens."""
        return any(objective.on_masked for objective in self.learnt.values())

    def strength(self, step: int, initial: float) -> float:
        """Quantisation strength of a step in a stage whose predecessor ended at `initial`."""
        ramp = self.lambda_warmup.strength(step, self.total_steps)
        return max(initial, ramp)

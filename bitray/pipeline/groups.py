"""The groups of settings of a run, each by itself; `Config` puts them together."""

from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Field, field_validator, model_validator

from bitray.export import GGUFType
from bitray.models.mask_token import MASK
from bitray.objectives.base import Weight
from bitray.settings import Settings
from bitray.training.settings import TrainingSettings
from bitray.training.teacher_settings import InProcess, Teachers


class Quantization(Settings):
    """What the converted layers compute in."""

    activation_bits: Literal[8] = 8
    subln: Literal["paper", "all", "none"] = "paper"
    """Where a norm goes before a projection: o and down, all seven, or nowhere."""
    subln_init: Literal["calibrated", "ones"] = "calibrated"


class ModelSettings(Settings):
    """The model that becomes ternary."""

    name: str
    """Short, for folders and run names."""
    path: str | None = None
    """Hugging Face id or folder of a pretrained model; None: built from `config` and pretrained."""
    revision: str | None = None
    """Branch, tag or commit on the Hub; a run goes on with the commit that it is when the run
    begins."""
    config: dict[str, Any] | None = None
    """Arguments of the transformers configuration of a model built here, with its `model_type`."""
    tokenizer: str | None = None
    """Id or folder; None: the model's own, or one trained on the data for a model built here."""
    teacher: Teachers = InProcess()
    mask_token: str = MASK
    """Stands for what block diffusion is to guess; added to tokenizer and embeddings unless it is
    one of the tokenizer's reserved tokens."""
    quantization: Quantization = Quantization()

    @field_validator("teacher", mode="before")
    @classmethod
    def _teacher_is_a_node(cls, said: Any) -> Any:
        if isinstance(said, str):
            raise ValueError(f"a teacher has several settings; say model.teacher.path={said}")
        return said

    @model_validator(mode="after")
    def _has_one_origin(self) -> "ModelSettings":
        if (self.path is None) == (self.config is None):
            raise ValueError("give either path (pretrained) or config (built here), not both")
        return self

    def revision_of(self, path: str) -> str | None:
        """Which one to load of what lies at a path: the pretrained model has a `revision`."""
        return self.revision if path == self.path else None


class Scaling(Settings):
    """How many workers, and what each of them needs."""

    num_workers: int | tuple[int, int] = 1
    """Or `[fewest, most]`: as many as the cluster holds; the global batch stays the same."""
    use_gpu: bool = False
    gpus_per_worker: float = Field(default=1.0, gt=0, le=1)
    """Share of a GPU and of its memory that a worker takes, where it uses one."""
    cpus_per_worker: float = Field(default=1.0, gt=0)
    readers: int = Field(default=2, ge=1)
    """Tasks of Ray Data that read rows beside the workers."""
    cpus_per_reader: float = Field(default=0.25, gt=0)
    max_failures: int = Field(default=3, ge=0)
    """Restarts of the worker group before a run gives up."""
    placement: Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"] = "PACK"
    """Workers on few nodes, or on many."""
    sharding: Literal["full", "hybrid"] = "full"
    """Parameters sharded over all workers, or over those of a node and replicated between nodes."""
    worker_labels: dict[str, str] = {}
    """Labels of the nodes that workers may be on, as Ray's label selectors: `!gpu`, `in(a, b)`."""
    data_labels: dict[str, str] = {}
    """The same for the tasks that prepare and read rows, which Ray Data spreads over all nodes that
    have CPUs, those of GPUs too: `{role: data}` keeps them off, where nodes are labelled so."""
    patience_seconds: float = Field(default=600, ge=0)
    """How long a run waits for nodes that an autoscaler brings, or that others use."""
    hang_seconds: float = Field(default=600, gt=0)
    """Without a step for so long, and for 20 times the median step, workers start again."""

    @field_validator("num_workers", mode="before")
    @classmethod
    def _is_a_number_or_a_range(cls, said: Any) -> Any:
        counts = said if isinstance(said, list | tuple) else [said]
        whole = all(isinstance(count, int) and count >= 1 for count in counts)
        if not whole or len(counts) > 2 or list(counts) != sorted(counts):
            raise ValueError(f"give a number of workers, or [fewest, most], from 1 on, not {said}")
        return counts[0] if len(counts) == 1 else tuple(counts)

    @property
    def fewest(self) -> int:
        """Workers that a run needs."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[0]

    @property
    def most(self) -> int:
        """Workers that a run makes use of."""
        return self.num_workers if isinstance(self.num_workers, int) else self.num_workers[1]

    @property
    def per_worker(self) -> dict[str, float]:
        """What Ray is asked for each worker."""
        return {
            "CPU": self.cpus_per_worker,
            **({"GPU": self.gpus_per_worker} if self.use_gpu else {}),
        }

    @model_validator(mode="after")
    def _shares_are_of_different_groups(self) -> "Scaling":
        if self.gpus_per_worker < 1 and self.most > 1:
            raise ValueError(
                f"gpus_per_worker {self.gpus_per_worker:g} is for a single worker: NCCL does not "
                f"put two of {self.most} workers on the same GPU"
            )
        return self


class MicroBatch(Settings):
    """A global batch cut up."""

    batch_size: int = Field(ge=1)
    gradient_accumulation_steps: int = Field(ge=1)


class GPU(Settings):
    """A kind of GPU, and the micro-batches that fit it; settings of stages go before them."""

    name: str
    batches: dict[str, dict[str, MicroBatch]] = {}
    """By short name of the model and by stage."""


class StageSettings(TrainingSettings):
    """Training settings of one stage, and its place in a pipeline."""

    dense: bool = False
    """Full precision: a stage that pretrains the model which becomes ternary later."""
    convert_only: bool = False
    """No steps: make the model ternary and keep it at strength 0."""
    predecessors: tuple[str, ...] = ()
    """Stages whose result this one starts from, first found first; none: the original model."""
    start_from: str | None = None
    """A checkpoint or model to start from, whatever the pipeline holds."""
    scaling: Scaling | None = None
    shared_run: str | None = None
    """Folder of a run of the same settings that has done this stage for all; None: this run."""

    @model_validator(mode="after")
    def _has_a_length(self) -> "StageSettings":
        if not self.convert_only and self.max_steps is None and self.total_tokens is None:
            raise ValueError("give max_steps or total_tokens, else nobody knows when it ends")
        return self

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the stage."""
        return 0 if self.convert_only else super().total_steps

    def strength(self, step: int, initial: float) -> float:
        """Quantisation strength of a step; a dense stage has none."""
        return 0.0 if self.dense else super().strength(step, initial)


class RowKind(NamedTuple):
    """What a stage wants of its rows. The greatest of a run's kinds is the one it evaluates on."""

    length: int
    packed: bool

    @classmethod
    def of(cls, stage: StageSettings) -> "RowKind":
        """The rows of a stage."""
        return cls(stage.max_seq_length, stage.packing.enabled)

    def __str__(self) -> str:
        return f"{self.length}{'' if self.packed else ', one document a row'}"


class WandB(Settings):
    """Weights & Biases. No account is needed: without a key it is off unless asked for."""

    enabled: bool | None = None
    """None: when WANDB_API_KEY is set. Asked for without a key, it records offline."""
    project: str = "bitray"
    group: str | None = None
    """Runs that belong together; of a sweep's trials the sweep."""
    tags: tuple[str, ...] | None = None
    """None: the stages that the run trains."""


class Logging(Settings):
    """Where metrics go besides `metrics.jsonl`."""

    tensorboard: bool = True
    wandb: WandB = WandB()


class Distillation(Settings):
    """The coefficients of BitDistill, for every stage that distils attention; what a stage or
    `training.objectives` says of its objectives is stronger. None: as there."""

    lambda_logits: Weight | None = None
    gamma_attention: Literal["auto"] | Annotated[float, Field(gt=0)] | None = None
    """`auto`: measured at the start of the stage (see AttentionDistill)."""
    temperature: float | None = Field(default=None, gt=0, allow_inf_nan=False)


class EvaluationSettings(Settings):
    """Held-out evaluation at the end of every stage."""

    rows: int = Field(default=256, ge=1)
    """At most so many validation rows per domain."""


class ExportSettings(Settings):
    """What is written at the end of a run."""

    gguf: tuple[GGUFType, ...] = ()
    huggingface: bool = False


class ReportSettings(Settings):
    """Samples in the report."""

    prompts: tuple[str, ...] = ()
    max_new_tokens: int = Field(default=48, ge=1)


class ResumeRun(Settings):
    """What happens when the experiment's folder already holds a run."""

    skip_completed: bool = True
    fresh: bool = False
    """Delete what the folder holds and start over."""
    fork: bool = False
    """Continue although settings that matter differ: another lineage begins in the same folder."""
    storage_patience: float = Field(default=600.0, gt=0)
    """Seconds that object storage which does not answer is tried again before the run stops."""

"""The root of the configuration. It composes the rooms' settings and says how stages inherit."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from bitray.data import DataSettings
from bitray.data.weights import quantise
from bitray.export import GGUFType
from bitray.models.mask_token import MASK
from bitray.objectives.base import Weight
from bitray.pipeline.cost import Cost
from bitray.settings import Composed, Settings, Tree, UserError, merge, nearest
from bitray.training.settings import TrainingSettings
from bitray.training.teacher_settings import Actors, InProcess, Server, Teachers


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
    """The same for the tasks that prepare and read rows; those avoid nodes with GPUs anyway."""
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
    level: Literal["debug", "info", "warning", "error"] = "info"


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


class Config(Composed):
    """A run: a model, data, stages, and what surrounds them."""

    configs: ClassVar[Path] = Path(__file__).parent.parent / "configs"
    default_groups: ClassVar[dict[str, str]] = {
        "model": "model/demo",
        "data": "data/embedded",
        "pipeline": "pipeline/demo",
        "scaling": "scaling/laptop",
    }
    slots: ClassVar[dict[str, str]] = {"training": "pipeline", "smoke": "pipeline"}
    aliases: ClassVar[dict[str, str]] = {"distributed": "scaling"}

    model: ModelSettings
    data: DataSettings
    training: TrainingSettings = TrainingSettings()
    """The default of every stage."""
    stages: dict[str, StageSettings] = Field(min_length=1)
    distillation: Distillation = Distillation()
    scaling: Scaling = Scaling()
    gpu: GPU | None = None
    """Micro-batches by model and stage, laid over the stages' presets."""
    cost: Cost = Cost()
    probe: bool = False
    """Measure memory and speed by some steps of the real model, for the plan (`--dry-run`) and for
    what the report compares with."""
    output_dir: str = "runs"
    experiment: str | None = None
    """Folder of the run below `output_dir`; None: `bitray_{model}`."""
    evaluation: EvaluationSettings = EvaluationSettings()
    export: ExportSettings = ExportSettings()
    report: ReportSettings = ReportSettings()
    logging: Logging = Logging()
    resume: ResumeRun = ResumeRun()

    @classmethod
    def arrange(cls, preset: Tree, said: Sequence[Tree]) -> Tree:
        """Stage preset < `gpu` and `distillation.*` < `training.*` < `stages.NAME.*`; a later voice
        wins over an earlier one."""
        preset = _fitted(preset, said)
        for tree in [{"distillation": preset.get("distillation", {})}, *said]:
            stages = dict(preset.get("stages", {}))
            own = tree.get("stages") or {}
            _check_stage_names(own, stages)
            for name in [*stages, *(n for n in own if n not in stages)]:
                above = merge(tree.get("training") or {}, own.get(name) or {})
                below = stages.get(name, {})
                if _distils_attention(merge(below, above)):
                    below = merge(below, _coefficients(tree.get("distillation", {})))
                stages[name] = merge(below, above)
            preset = {**merge(preset, {k: v for k, v in tree.items() if k != "stages"})}
            preset["stages"] = stages
        return preset

    @classmethod
    def cause(cls, loc: tuple[Any, ...]) -> tuple[Any, ...]:
        """A mistake in `training.*` shows in every stage, and is told once."""
        inherited = loc[:1] == ("stages",) and len(loc) > 2
        return ("training", *loc[2:]) if inherited else loc

    def fp8_problem(self, capability: tuple[int, int] | None = None) -> str | None:
        """Why the first stage that computes in 8-bit floats cannot; of GPUs that are not known yet,
        whether there will be any."""
        for name, stage in self.stages.items():
            device = "cuda" if self.scaling_of(name).use_gpu else "cpu"
            why = stage.fp8.problem(device, capability)
            if why and stage.total_steps and not stage.dense:
                return f"stages.{name}.{why}"
        return None

    @property
    def gpu_name(self) -> str | None:
        """The kind of GPU that was chosen."""
        return self.gpu.name if self.gpu else None

    def problems(self) -> list[str]:
        most = (self.model.config or {}).get("max_position_embeddings")
        return [
            *filter(None, [self.fp8_problem(), self.cost.problem(self.gpu_name)]),
            *self._besides_stages(),
            *(
                text
                for name, stage in self.stages.items()
                for text in [
                    *_stage_problems(name, stage),
                    *_teacher_problems(name, stage, self.model.teacher),
                    *_phase_problems(name, stage, self.data),
                    *self.too_long(name, most),
                    *self._influence_problems(name, stage),
                    *self._sharding_problems(name, stage),
                ]
            ),
        ]

    def _besides_stages(self) -> list[str]:
        """What no stage can make use of, or no export."""
        stages, found = self.stages.values(), []
        said = self.distillation.model_dump(exclude_none=True)
        if said and not any(stage.objectives.attention_distill for stage in stages):
            found.append(
                f"distillation.{next(iter(said))}: no stage distils attention; take a stage of "
                "BitDistill, training=bitdistill_full"
            )
        if any(stage.lrc for stage in stages) and (self.export.gguf or self.export.huggingface):
            found.append(
                "export: no engine computes the low-rank corrections of stage lrc; leave the stage "
                "out, or export the stage before it with jobs/export.py"
            )
        return found

    def influence_interval(self, stage: str) -> int | None:
        """Steps between decisions about the mixture, or None where there are none."""
        settings = self.stages[stage]
        if not settings.influence.enabled or not settings.total_steps:
            return None
        sources = len(self.data.remixed())
        return settings.influence.interval(len(self.probes(stage)), sources, settings.rows_per_step)

    def probes(self, stage: str) -> dict[str, list[str]]:
        """Probe domains of a stage's influence, and the sources whose documents they hold."""
        chosen, known = self.stages[stage].influence.probes, self.data.probe_domains()
        return {name: found for name, found in known.items() if not chosen or chosen.get(name)}

    def _influence_problems(self, name: str, stage: StageSettings) -> list[str]:
        influence, where = stage.influence, f"stages.{name}.influence"
        if not influence.enabled or not stage.total_steps:
            return []
        known, sources = self.data.probe_domains(), len(self.data.remixed())
        found = [
            f"{where}.probes.{probe}: there is no such probe domain{nearest(probe, known)}; "
            f"there are: {', '.join(known)}"
            for probe in influence.probes
            if probe not in known
        ]
        if sources < 2:
            found.append(f"{where}: there is only {sources} source to train on, nothing to remix")
        elif not sources * influence.min_weight <= 1 <= sources * influence.max_weight:
            found.append(
                f"{where}: weights of {sources} sources cannot all lie between min_weight "
                f"{influence.min_weight:g} and max_weight {influence.max_weight:g} and sum to 1; "
                f"min_weight must be at most {1 / sources:.4g} and max_weight at least that"
            )
        always = all("continue_pretrain" in stage.weights(step) for step in stage.turns)
        if influence.method == "ado" and not always:
            found.append(f"{where}.method: ado needs the loss of continue_pretrain, which is off")
        return found

    def _sharding_problems(self, name: str, stage: StageSettings) -> list[str]:
        kind = stage.optimizer.type
        if self.scaling_of(name).sharding == "full" or kind == "adamw" or not stage.total_steps:
            return []
        return [
            f"scaling.sharding: hybrid, but {kind} of stages.{name}.optimizer works on parameters "
            "that are sharded over all workers; take adamw, or sharding=full"
        ]

    def too_long(self, stage: str, positions: int | None) -> list[str]:
        """What is wrong if rows of a stage are longer than the model has positions."""
        length = self.stages[stage].max_seq_length
        if positions is None or length <= positions:
            return []
        where = f"stages.{stage}.max_seq_length"
        return [f"{where}: {length} is more than the {positions} positions of {self.model.name}"]

    @property
    def run_dir(self) -> str:
        """`{output_dir}/{experiment}`."""
        return f"{self.output_dir.rstrip('/')}/{self.experiment or f'bitray_{self.model.name}'}"

    def scaling_of(self, stage: str) -> Scaling:
        """The stage's own scaling, else the run's."""
        return self.stages[stage].scaling or self.scaling


def _fitted(preset: Tree, said: Sequence[Tree]) -> Tree:
    """The presets with the micro-batches of the chosen kind of GPU for the model."""
    models = [tree.get("model") for tree in (preset, *said)]
    names = [model["name"] for model in models if isinstance(model, dict) and "name" in model]
    known = (preset.get("gpu") or {}).get("batches", {}).get(names[-1] if names else None, {})
    stages = preset.get("stages", {})
    fitting = {name: batch for name, batch in known.items() if name in stages}
    return merge(preset, {"stages": fitting}) if fitting else preset


def _distils_attention(stage: Tree) -> bool:
    objectives = stage.get("objectives")
    return isinstance(objectives, dict) and objectives.get("attention_distill") is not None


def _coefficients(said: Any) -> Tree:
    """`distillation.*` as settings of a stage; what is wrong there is told of the root's field."""
    try:
        told = Distillation.model_validate(said).model_dump(exclude_none=True)
    except ValidationError:
        return {}
    places = {
        "lambda_logits": ("logits_distill", "weight"),
        "temperature": ("logits_distill", "temperature"),
        "gamma_attention": ("attention_distill", "gamma"),
    }
    objectives: Tree = {}
    for name, (objective, setting) in places.items():
        if name in told:
            objectives.setdefault(objective, {})[setting] = told[name]
    return {"objectives": objectives} if objectives else {}


def _check_stage_names(own: Tree, known: Tree) -> None:
    for name, values in own.items():
        new = isinstance(values, dict) and {"max_steps", "total_tokens", "convert_only"} & set(
            values
        )
        if known and name not in known and not new:
            raise UserError(
                f"stages.{name}: this pipeline has no such stage{nearest(name, known)}; "
                f"it has: {', '.join(known)}"
            )


def _phase_problems(name: str, stage: StageSettings, data: DataSettings) -> list[str]:
    found = []
    for number, phase in enumerate(stage.curriculum.phases):
        try:
            quantise(data.shares() if phase.mixture is None else phase.mixture, tuple(data.sources))
        except UserError as error:
            said = str(error).replace("weights", "mixture", 1)
            found.append(f"stages.{name}.curriculum.phases.{number}.{said}")
    return found


def _stage_problems(name: str, stage: StageSettings) -> list[str]:
    where = f"stages.{name}"
    if stage.total_steps == 0:
        return []
    given = [name for name, each in stage.objectives if each is not None]
    found = [
        f"{where}.curriculum.phases.{number}: {name} is none of the stage's objectives "
        f"({', '.join(given)}); give {where}.objectives.{name}, or phases to other stages only"
        for number, phase in enumerate(stage.curriculum.phases)
        for name in phase.weights
        if name not in given
    ]
    without = next((step for step in stage.turns if not stage.weights(step)), None)
    if without is not None:
        at = f" at step {without}: see its curriculum" if stage.curriculum.phases else ""
        found.append(f"{where}.objectives: no objective has a weight above 0{at}")
    if stage.dense and stage.needs_teacher:
        found.append(f"{where}: a dense stage has no teacher, but its objectives need one")
    first = (stage.weights(step) for step in stage.turns)
    active: dict[str, float] = next((w for w in first if "attention_distill" in w), {})
    attention = stage.objectives.attention_distill
    measured = active and attention and attention.factor is None
    if measured and "continue_pretrain" not in active:
        found.append(
            f"{where}.objectives.attention_distill.gamma: auto is measured by the gradient of "
            "continue_pretrain, which is off; give a number, or continue_pretrain a weight"
        )
    if stage.lrc and stage.dense:
        found.append(f"{where}.lrc: a dense stage has no ternary layer to correct")
    warmup = stage.lambda_warmup
    if warmup.enabled and not stage.dense and (warmup.warmup_steps or 0) > stage.total_steps:
        found.append(
            f"{where}.lambda_warmup.warmup_steps: {warmup.warmup_steps} is longer than the stage "
            f"({stage.total_steps} steps), which would end before the model is ternary"
        )
    return found


def _teacher_problems(name: str, stage: StageSettings, teacher: Teachers) -> list[str]:
    """What a remote teacher is asked for and does not send."""
    if not stage.total_steps or not isinstance(teacher, Actors | Server):
        return []
    where, found = f"stages.{name}.objectives", []
    for each, objective in stage.learnt.items():
        if objective.needs_teacher and not objective.takes_top_k:
            found.append(
                f"{where}.{each}: compares more than the likeliest tokens, which are all that a "
                f"remote teacher (model.teacher.type={teacher.type}) sends; take in_process, "
                "offload or four_bit"
            )
    distill = stage.objectives.logits_distill
    if distill is None or not distill.weight:
        return found
    if isinstance(teacher, Server) and distill.temperature != 1:
        found.append(
            f"{where}.logits_distill.temperature: {distill.temperature:g}, but a server tells "
            "log-probabilities at temperature 1 only; set 1, or take model.teacher.type=actors"
        )
    if (distill.top_k or 0) > teacher.top_k:
        found.append(
            f"{where}.logits_distill.top_k: {distill.top_k} is more than the {teacher.top_k} "
            "tokens that the teacher sends (model.teacher.top_k)"
        )
    return found

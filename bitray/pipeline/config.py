"""The root of the configuration. It composes the rooms' settings and says how stages inherit."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError

from bitray.data import DataSettings
from bitray.pipeline import consistency
from bitray.pipeline.cost import Cost
from bitray.pipeline.groups import (
    GPU,
    Distillation,
    EvaluationSettings,
    ExportSettings,
    Logging,
    ModelSettings,
    ReportSettings,
    ResumeRun,
    Scaling,
    StageSettings,
)
from bitray.settings import Composed, Layer, Tree, merge, nearest
from bitray.training.settings import TrainingSettings


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
    nodes: ClassVar[dict[str, str]] = {"pipeline": "stages"}

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
    def arrange(cls, preset: Tree, layers: Sequence[Layer]) -> tuple[Tree, list[str]]:
        """Stage preset < `gpu` and `distillation.*` < `training.*` < `stages.NAME.*`; a later voice
        wins over an earlier one."""
        tree, stages, problems = preset, dict(preset.get("stages", {})), list[str]()
        model, wrong = _model_name(preset, layers), None
        for voice in _voices(preset, layers):
            tree = merge(tree, voice, cls.default_types())
            own = voice.get("stages") or {}
            if not isinstance(own, dict):
                own, wrong = {}, own
            strange = _strange_stages(own, stages)
            problems += strange.values()
            batches = _micro_batches(tree.get("gpu"), model) if "gpu" in voice else {}
            for name in [*stages, *(n for n in own if n not in {*stages, *strange})]:
                below = _over(stages.get(name, {}), batches.get(name, {}))
                stages[name] = _spoken_of(below, voice, own.get(name))
        return {**tree, "stages": wrong or stages}, problems

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

    def spelled(self) -> Tree:
        """Each stage says all of itself, `training` only what was said, so that it does for the
        stages of another pipeline too."""
        said = self.training.model_dump(mode="json", exclude_unset=True)
        return {**super().spelled(), "training": said}

    def problems(self) -> list[str]:
        return consistency.problems(self)

    def influence_interval(self, stage: str) -> int | None:
        """Steps between decisions about the mixture, or None where there are none."""
        settings = self.stages[stage]
        if not settings.influence.enabled or not settings.total_steps:
            return None
        sources = len(self.data.remixed())
        return settings.influence.interval(len(self.probes(stage)), sources, settings.rows_per_step)

    def probes(self, stage: str) -> dict[str, list[str]]:
        """Probe domains of a stage's influence, and the sources whose documents they hold; `ado`
        looks at none."""
        influence, known = self.stages[stage].influence, self.data.probe_domains()
        if influence.method == "ado":
            return {}
        chosen = influence.probes
        return {name: found for name, found in known.items() if not chosen or chosen.get(name)}

    def too_long(self, stage: str, positions: Any) -> list[str]:
        """What is wrong if rows of a stage are longer than the model has positions; what is no
        number is told of by who makes the model."""
        length = self.stages[stage].max_seq_length
        if not isinstance(positions, int) or length <= positions:
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


def _model_name(preset: Tree, layers: Sequence[Layer]) -> str | None:
    models = [tree.get("model") for tree in (preset, *(layer.values for layer in layers))]
    names = [model["name"] for model in models if isinstance(model, dict) and "name" in model]
    return names[-1] if names and isinstance(names[-1], str) else None


def _voices(preset: Tree, layers: Sequence[Layer]) -> Iterator[Tree]:
    """What is said of stages, one after the other: by presets that are about all of them, then by
    each layer, and with it by those presets that it chose."""
    about: Tree = {name: preset[name] for name in ("gpu", "distillation") if name in preset}
    yield about
    for layer in layers:
        chosen = {name: said for name, said in about.items() if name in (layer.groups or {})}
        yield merge(chosen, layer.values)


def _spoken_of(stage: Any, voice: Tree, own: Any) -> Any:
    """A stage after a voice, which says `own` of this one."""
    training = voice.get("training")  # what is no settings is told of as the root's

    def said(below: Any) -> Any:
        return _over(_over(below, training if isinstance(training, dict) else {}), own or {})

    if _distils_attention(said(stage)):
        stage = _over(stage, _coefficients(voice.get("distillation", {})))
    return said(stage)


def _over(below: Any, above: Any) -> Any:
    """Settings of a stage on top of others. A length in tokens replaces one in steps."""
    if not isinstance(below, dict):
        return below  # which is wrong, and is told of
    tokens = isinstance(above, dict) and above.get("total_tokens") and not above.get("max_steps")
    below = {**below, "max_steps": None} if tokens else below
    return merge(below, above, StageSettings.default_types())


def _micro_batches(said: Any, model: str | None) -> Tree:
    """By stage, the micro-batches of a kind of GPU for a model; what is wrong there is told of the
    root's field."""
    try:
        batches = GPU.model_validate(said).batches.get(model or "", {})
    except ValidationError:
        return {}
    return {stage: batch.model_dump() for stage, batch in batches.items()}


def _distils_attention(stage: Any) -> bool:
    objectives = stage.get("objectives") if isinstance(stage, dict) else None
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


def _strange_stages(own: Tree, known: Tree) -> dict[str, str]:
    """Stages that a pipeline does not have, and that are not new ones with a length of their own;
    and what to say of them."""
    length = {"max_steps", "total_tokens", "convert_only"}
    return {
        name: f"stages.{name}: this pipeline has no such stage{nearest(str(name), known)}; "
        f"it has: {', '.join(known)}"
        for name, values in own.items()
        if known and name not in known and not (isinstance(values, dict) and length & set(values))
    }

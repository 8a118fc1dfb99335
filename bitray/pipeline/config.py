"""The root of the configuration. It composes the rooms' settings and says how stages inherit."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from pydantic import Field, ValidationError

from bitray.data import DataSettings
from bitray.data.weights import bounds_in_units, quantise
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
from bitray.settings import Composed, Layer, Tree, UserError, merge, nearest
from bitray.training.settings import TrainingSettings
from bitray.training.teacher_settings import Actors, Server, Teachers


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

    def _attention_problems(self) -> Iterator[str]:
        """Stages that cannot attend by blocks as they should."""
        for name, stage in self.stages.items():
            if stage.attention == "flex" and stage.total_steps:
                where = f"stages.{name}.attention: flex"
                if not self.scaling_of(name).use_gpu:
                    yield f"{where} needs GPUs, these workers have CPUs; take sdpa"
                elif stage.optimizer.type == "muonclip":
                    yield f"{where} never makes the logits that muonclip measures; take sdpa"

    def _kernel_problems(self) -> Iterator[str]:
        for name, stage in self.stages.items():
            if stage.int8_kernel and stage.total_steps and not self.scaling_of(name).use_gpu:
                yield (
                    f"stages.{name}.int8_kernel: needs GPUs, these workers have CPUs; "
                    "set int8_kernel=false"
                )

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
        most = (self.model.config or {}).get("max_position_embeddings")
        return [
            *filter(None, [self.fp8_problem(), self.cost.problem(self.gpu_name)]),
            *self._attention_problems(),
            *self._kernel_problems(),
            *self._besides_stages(),
            *(
                text
                for name, stage in self.stages.items()
                for text in [
                    *_stage_problems(name, stage),
                    *self._unheard_weights(name, stage),
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

    def _unheard_weights(self, name: str, stage: StageSettings) -> list[str]:
        """Weights given over phases that all weigh the objective themselves. Whoever gives both,
        as a saved configuration does, knows the phases."""

        def last_said(path: str) -> int:
            return self.last_said(f"training.{path}", f"stages.{name}.{path}")

        phases, phased = stage.curriculum.phases, last_said("curriculum.phases")
        if not phases or not stage.total_steps:
            return []
        return [
            f"stages.{name}.objectives.{each}.weight: {settings.weight:g} changes nothing, for all "
            f"phases have a weight of their own for {each} "
            f"({', '.join(f'{phase.weights[each]:g}' for phase in phases)}); change "
            f"stages.{name}.curriculum.phases, or set it to [] for one weight all along"
            for each, settings in stage.objectives
            if settings is not None
            and all(each in phase.weights for phase in phases)
            and last_said(f"objectives.{each}.weight") > phased
        ]

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
        else:
            try:
                bounds_in_units(sources, influence.min_weight, influence.max_weight)
            except UserError as error:
                found.append(f"{where}: {error}")
        always = all("continue_pretrain" in stage.weights(step) for step in stage.turns)
        if influence.method == "ado" and not always:
            found.append(f"{where}.method: ado needs the loss of continue_pretrain, which is off")
        if influence.method != "ado" and not self.data.split.probe:
            found.append(
                f"{where}.method: {influence.method} compares with held-out documents, and "
                "data.split.probe=0 leaves none; give 0.02, or take method=ado, which needs none"
            )
        found += [
            f"stages.{name}.curriculum.phases.{number}.mixture.{source}: influence would end it at "
            f"its first decision, for it remixes what data.sources gives a weight; give "
            f"data.sources.{source}.weight above 0, or leave the source to stages without influence"
            for number, phase in enumerate(stage.curriculum.phases)
            for source, weight in (phase.mixture or {}).items()
            if weight and source in self.data.sources and source not in self.data.remixed()
        ]
        return found

    def _sharding_problems(self, name: str, stage: StageSettings) -> list[str]:
        kind = stage.optimizer.type
        if self.scaling_of(name).sharding == "full" or kind == "adamw" or not stage.total_steps:
            return []
        return [
            f"scaling.sharding: hybrid, but {kind} of stages.{name}.optimizer works on parameters "
            "that are sharded over all workers; take adamw, or sharding=full"
        ]

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
    falling = stage.distillation_schedule.type
    if falling != "constant" and stage.lm_loss_weight is None:
        found.append(
            f"{where}.distillation_schedule.type: {falling} lowers the share that "
            "lm_loss_weight leaves to layers, which is not given; "
            f"give {where}.lm_loss_weight, such as 0.5, or take constant"
        )
    if stage.lrc and stage.dense:
        found.append(f"{where}.lrc: a dense stage has no ternary layer to correct")
    return found + _warmup_problems(where, stage)


def _warmup_problems(where: str, stage: StageSettings) -> list[str]:
    """Warm-ups of the ternary layers that the stage would not see the end of."""
    strength, saliency = stage.lambda_warmup, stage.saliency_curriculum
    sparsity, sparse = stage.activation_sparsity, "activations are as sparse as they should be"
    warmups = (
        ("lambda_warmup", strength.enabled, strength.warmup_steps, "the model is ternary"),
        ("saliency_curriculum", saliency.enabled, saliency.warmup_steps, "fewer columns wait"),
        ("activation_sparsity.warmup", sparsity.enabled, sparsity.warmup.warmup_steps, sparse),
    )
    return [
        f"{where}.{name}.warmup_steps: {steps} is longer than the stage ({stage.total_steps} "
        f"steps), which would end before {what}"
        for name, enabled, steps, what in warmups
        if enabled and not stage.dense and (steps or 0) > stage.total_steps
    ]


def _teacher_problems(name: str, stage: StageSettings, teacher: Teachers) -> list[str]:
    """What a remote teacher is asked for and does not send."""
    if not stage.total_steps or not isinstance(teacher, Actors | Server):
        return []
    where, found = f"stages.{name}.objectives", []
    for each, objective in stage.learnt.items():
        if objective.needs_teacher and each not in stage.likeliest:
            found.append(
                f"{where}.{each}: compares more than the likeliest tokens, which are all that a "
                f"remote teacher (model.teacher.type={teacher.type}) sends; take in_process, "
                "offload or four_bit"
            )
    for each, distill in stage.likeliest.items():
        if isinstance(teacher, Server) and distill.temperature != 1:
            found.append(
                f"{where}.{each}.temperature: {distill.temperature:g}, but a server tells "
                "log-probabilities at temperature 1 only; set 1, or take model.teacher.type=actors"
            )
        if (distill.top_k or 0) > teacher.top_k:
            found.append(
                f"{where}.{each}.top_k: {distill.top_k} is more than the {teacher.top_k} "
                "tokens that the teacher sends (model.teacher.top_k)"
            )
    heats = {each: f"{distill.temperature:g}" for each, distill in stage.likeliest.items()}
    if isinstance(teacher, Actors) and len(set(heats.values())) > 1:
        found.append(
            f"{where}: {' and '.join(heats)} have temperatures {' and '.join(heats.values())}, but "
            "actors are asked at one (model.teacher.type=actors); give both the same, or take "
            "in_process, offload or four_bit"
        )
    return found

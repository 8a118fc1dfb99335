"""What is wrong with a configuration that is well-formed: what its parts ask of each other."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from bitray.data import DataSettings
from bitray.data.weights import bounds_in_units, quantise
from bitray.pipeline.groups import StageSettings
from bitray.settings import UserError, nearest
from bitray.training.teacher_settings import Actors, Server, Teachers

if TYPE_CHECKING:
    from bitray.pipeline.config import Config


def problems(config: "Config") -> list[str]:
    """Everything, a sentence each."""
    most = (config.model.config or {}).get("max_position_embeddings")
    return [
        *filter(None, [config.fp8_problem(), config.cost.problem(config.gpu_name)]),
        *_attention_problems(config),
        *_kernel_problems(config),
        *_besides_stages(config),
        *(
            text
            for name, stage in config.stages.items()
            for text in [
                *_stage_problems(name, stage),
                *_unheard_weights(config, name, stage),
                *_teacher_problems(name, stage, config.model.teacher),
                *_phase_problems(name, stage, config.data),
                *config.too_long(name, most),
                *_influence_problems(config, name, stage),
                *_sharding_problems(config, name, stage),
            ]
        ),
    ]


def _besides_stages(config: "Config") -> list[str]:
    """What no stage can make use of, or no export."""
    stages, found = config.stages.values(), []
    said = config.distillation.model_dump(exclude_none=True)
    if said and not any(stage.objectives.attention_distill for stage in stages):
        found.append(
            f"distillation.{next(iter(said))}: no stage distils attention; take a stage of "
            "BitDistill, training=bitdistill_full"
        )
    if any(stage.lrc for stage in stages) and (config.export.gguf or config.export.huggingface):
        found.append(
            "export: no engine computes the low-rank corrections of stage lrc; leave the stage "
            "out, or export the stage before it with jobs/export.py"
        )
    return found


def _unheard_weights(config: "Config", name: str, stage: StageSettings) -> list[str]:
    """Weights given over phases that all weigh the objective themselves. Whoever gives both,
    as a saved configuration does, knows the phases."""

    def last_said(path: str) -> int:
        return config.last_said(f"training.{path}", f"stages.{name}.{path}")

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


def _attention_problems(config: "Config") -> Iterator[str]:
    """Stages that cannot attend by blocks as they should."""
    for name, stage in config.stages.items():
        if stage.attention == "flex" and stage.total_steps:
            where = f"stages.{name}.attention: flex"
            if not config.scaling_of(name).use_gpu:
                yield f"{where} needs GPUs, these workers have CPUs; take sdpa"
            elif stage.optimizer.type == "muonclip":
                yield f"{where} never makes the logits that muonclip measures; take sdpa"


def _kernel_problems(config: "Config") -> Iterator[str]:
    for name, stage in config.stages.items():
        if stage.int8_kernel and stage.total_steps and not config.scaling_of(name).use_gpu:
            yield (
                f"stages.{name}.int8_kernel: needs GPUs, these workers have CPUs; "
                "set int8_kernel=false"
            )


def _influence_problems(config: "Config", name: str, stage: StageSettings) -> list[str]:
    influence, where = stage.influence, f"stages.{name}.influence"
    if not influence.enabled or not stage.total_steps:
        return []
    known, sources = config.data.probe_domains(), len(config.data.remixed())
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
    if influence.method != "ado" and not config.data.split.probe:
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
        if weight and source in config.data.sources and source not in config.data.remixed()
    ]
    return found


def _sharding_problems(config: "Config", name: str, stage: StageSettings) -> list[str]:
    kind = stage.optimizer.type
    if config.scaling_of(name).sharding == "full" or kind == "adamw" or not stage.total_steps:
        return []
    return [
        f"scaling.sharding: hybrid, but {kind} of stages.{name}.optimizer works on parameters "
        "that are sharded over all workers; take adamw, or sharding=full"
    ]


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

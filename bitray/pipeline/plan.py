"""Before a run: whether the cluster can hold it, what it will do, and what it takes."""

import copy
import os
from collections.abc import Mapping
from dataclasses import dataclass

import ray
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitray.data.tokenizer import check_vocabulary, tokenizer_identity
from bitray.export import can_export
from bitray.export.huggingface import form_of
from bitray.export.tokenizer import tokenizer_fields
from bitray.models.convert import is_bitnet, to_bitnet
from bitray.models.families import attention_projections, decoder_layers
from bitray.models.loading import (
    build_model,
    check_weights,
    load_tokenizer,
    local_model,
    skeleton,
)
from bitray.models.low_rank import add_corrections, train_corrections_only
from bitray.models.mask_token import set_mask_token
from bitray.nn import bit_linears, rank_of
from bitray.objectives import AttentionDistill, HiddenDistill
from bitray.pipeline.cluster import coming, reserved_cpus
from bitray.pipeline.config import Config
from bitray.pipeline.cost import Expected, duration, money
from bitray.pipeline.folders import (
    located,
    named_checkpoint,
    passed_over,
    resume_point,
    stage_folder,
)
from bitray.pipeline.material import at_commit, inputs_on_hub, named_tokenizer
from bitray.pipeline.remix import schedule_of_mixture
from bitray.pipeline.report import Table
from bitray.pipeline.session import ray_session
from bitray.pipeline.teacher_server import checked
from bitray.settings import Passing, UserError, listed
from bitray.training.flops import flops_per_token
from bitray.training.teacher_settings import Actors, InProcess, Offload, Server

GB = 1e9


def on_cluster() -> bool:
    """Whether a run would be on a cluster that is there, rather than on this machine alone."""
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster, with those that an autoscaler may bring, or of this machine
    where there is none."""
    if not on_cluster():
        return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    with ray_session():
        here = {key: float(value) for key, value in ray.cluster_resources().items()}
        return here | {key: max(most, here.get(key, 0.0)) for key, most in coming().items()}


def check_resources(config: Config, held: Mapping[str, float]) -> None:
    """`Passing` if workers and readers together need more than there is, where Ray would wait for
    ever; `UserError` for 8-bit floats that the GPUs here do not have."""
    whose = "the cluster" if on_cluster() else "this machine"
    here = torch.cuda.is_available() and not os.environ.get("RAY_ADDRESS")
    if problem := config.fp8_problem(torch.cuda.get_device_capability() if here else None):
        raise UserError(problem)
    for name in config.stages:
        scaling = config.scaling_of(name)
        teacher = _actors(config, name)
        cpus, gpus = needed(config, name, scaling.fewest)
        beside = f" + {teacher.count} teachers x {teacher.cpus:g}" if teacher else ""
        if cpus > held.get("CPU", 0.0):
            raise Passing(
                f"scaling: stage {name} needs {cpus:g} CPUs ({scaling.fewest} workers x "
                f"{scaling.cpus_per_worker:g} + {scaling.readers} readers x "
                f"{scaling.cpus_per_reader:g}{beside}), {whose} has {held.get('CPU', 0.0):g}; "
                "lower scaling.num_workers, scaling.cpus_per_worker or scaling.readers"
                + (" or model.teacher.cpus" if teacher else "")
            )
        if gpus > held.get("GPU", 0.0):
            raise Passing(
                f"scaling: stage {name} needs {gpus:g} GPUs, {whose} has "
                f"{held.get('GPU', 0.0):g}; take scaling=laptop to train on CPUs, or lower "
                "scaling.num_workers" + (" or model.teacher.gpus" if teacher else "")
            )


def needed(config: Config, stage: str, workers: int | None = None) -> tuple[float, float]:
    """CPUs and GPUs of so many workers of a stage, or the most there may be, with its readers and
    teachers."""
    scaling, teacher = config.scaling_of(stage), _actors(config, stage)
    count = scaling.most if workers is None else workers
    cpus, gpus = reserved_cpus(scaling, count), count * scaling.per_worker.get("GPU", 0.0)
    if teacher:
        cpus += teacher.count * teacher.cpus
        gpus += teacher.count * teacher.gpus
    return cpus, gpus


def _actors(config: Config, stage: str) -> Actors | None:
    """The Ray actors that teach in a stage."""
    teacher, settings = config.model.teacher, config.stages[stage]
    needed = settings.total_steps and settings.needs_teacher
    return teacher if needed and isinstance(teacher, Actors) else None


def outline(config: Config) -> PreTrainedModel:
    """The dense model without its weights."""
    if config.model.path is not None:
        return _outline_at(config, config.model.path)
    assert config.model.config is not None
    with torch.device("meta"):
        return build_model(config.model.config)


def teacher_outline(config: Config) -> PreTrainedModel:
    """The same of the teacher, which is the dense model where nothing else is said."""
    teacher = config.model.teacher
    path = None if isinstance(teacher, Server) else teacher.path
    return _outline_at(config, path) if path else outline(config)


def _outline_at(config: Config, path: str) -> PreTrainedModel:
    with local_model(path) as folder, torch.device("meta"):
        model = skeleton(folder or path, config.model.revision_of(path))
        check_weights(path)
        return model


def check_model(config: Config, model: PreTrainedModel, tokenizer: str | None) -> None:
    """`UserError` for what would only show after hours: a tokenizer or rows that do not fit the
    model, a teacher that speaks another language, an export that cannot be. `tokenizer` is None
    where one is still to be trained, to the model's own size."""
    _check_starts(config)
    most = model.config.max_position_embeddings
    found = [text for name in config.stages for text in config.too_long(name, most)]
    found += _pretrained_again(config)
    mine = None
    if tokenizer is not None:
        mine = load_tokenizer(tokenizer, config.model.revision_of(tokenizer))
        check_vocabulary(mine, model.config.vocab_size)
        check_teacher(config, mine)
        if any(stage.needs_mask_token for stage in config.stages.values()):
            set_mask_token(mine, config.model.mask_token)
    begins = 1.0 if is_bitnet(model) else 0.0
    converted = to_bitnet(model, config.model.quantization.subln)
    teacher = teacher_outline(config)
    found += [text for name in config.stages for text in _misfits(config, name, converted, teacher)]
    found += _not_exported(config, converted, mine, begins)
    if found:
        raise UserError(listed(found))


def _pretrained_again(config: Config) -> list[str]:
    """Dense stages of a model that is trained already: they are for random weights, and would undo
    what it has learnt."""
    if config.model.path is None:
        return []
    return [
        f"stages.{name}: pretrains a model that is built here, but {config.model.name} is "
        f"pretrained (model.path); take pipeline=standard, or stages.{name}.max_steps=0"
        for name, stage in config.stages.items()
        if stage.dense and stage.total_steps
    ]


def _not_exported(
    config: Config,
    converted: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None,
    strength: float,
) -> list[str]:
    """Why what the stages make of a model that begins at `strength` could not be written as what
    was asked for; a tokenizer of ours always can."""
    wanted, last = config.export, list(config.stages)[-1]
    if config.stages[last].dense or not (wanted.gguf or wanted.huggingface):
        return []
    reasons: dict[str, list[str]] = {}
    for kind in wanted.gguf:
        if reason := can_export(converted, kind):
            reasons.setdefault(reason, []).append(kind)
    found = [f"export.gguf: {', '.join(kinds)}: {why}" for why, kinds in reasons.items()]
    try:
        if wanted.gguf and tokenizer is not None:
            tokenizer_fields(tokenizer, converted.config.vocab_size)
        if wanted.huggingface:
            form_of(converted)
    except UserError as error:
        found.append(str(error))
    strength = _last_strength(config, strength)
    if strength < 1 and not _starts_elsewhere(config):
        found.append(
            f"export: stage {last} ends at quantisation strength {strength:.3g}, and only a model "
            "at 1 has ternary weights; let its lambda_warmup end before the stage does, or add a "
            "stage that trains at 1"
        )
    return found


def _starts_elsewhere(config: Config) -> bool:
    """Whether a stage begins with a checkpoint whose strength is not known here."""
    return any(s.start_from or named_checkpoint(config, n) for n, s in config.stages.items())


def _last_strength(config: Config, strength: float) -> float:
    """Strength at the last step of the stages of a model that begins at `strength`."""
    for stage in config.stages.values():
        if stage.total_steps and not stage.dense:
            strength = stage.strength(stage.total_steps - 1, strength)
    return strength


def _misfits(
    config: Config, name: str, student: PreTrainedModel, teacher: PreTrainedModel
) -> list[str]:
    """What a stage names and its models do not have: a decoder layer, a rank, a number of heads."""
    stage = config.stages[name]
    try:
        for objective in stage.learnt.values():
            if isinstance(objective, HiddenDistill):
                _check_layers(objective, len(decoder_layers(student)), len(decoder_layers(teacher)))
            if isinstance(objective, AttentionDistill):
                widths = [_widths(model, objective.layer) for model in (student, teacher)]
                objective.heads_for(student.config.num_key_value_heads, *widths)
        for layer in bit_linears(student) if stage.lrc else ():
            assert stage.lrc is not None
            rank_of(stage.lrc.rank, layer.in_features, layer.out_features)
    except UserError as error:
        return [f"stages.{name}: {error}"]
    return []


def _check_layers(objective: HiddenDistill, student: int, teacher: int) -> None:
    if student != teacher:
        raise UserError(
            f"hidden_distill compares layer by layer, but the student has {student} decoder layers "
            f"and the teacher {teacher}; take a teacher of {student}, or logits_distill"
        )
    objective.shares(student)


def _widths(model: PreTrainedModel, layer: int) -> list[int]:
    """Numbers that the query, key and value projections of a layer put out."""
    return [each.get_parameter("weight").shape[0] for each in attention_projections(model, layer)]


def _check_starts(config: Config) -> None:
    """A checkpoint that was named and is not there would show in the workers, or not at all where
    a stage before has one."""
    for name, stage in config.stages.items():
        for path in filter(None, (stage.start_from, named_checkpoint(config, name))):
            try:
                with local_model(path):
                    pass
            except UserError as error:
                raise UserError(f"stages.{name} is to start from {error}") from None


def check_teacher(config: Config, mine: PreTrainedTokenizerBase) -> None:
    """`UserError` for a teacher whose tokenizer is not the student's, `mine`."""
    teacher = config.model.teacher
    if isinstance(teacher, Server):
        if any(s.total_steps and s.needs_teacher for s in config.stages.values()):
            checked(teacher, mine)
        return
    name = teacher.path
    if name is None:
        return
    theirs = load_tokenizer(name, config.model.revision_of(name))
    if tokenizer_identity(theirs) == tokenizer_identity(mine):
        return
    ids, others = mine.get_vocab(), theirs.get_vocab()
    differing = sorted(number for token, number in ids.items() if others.get(token) != number)
    what = "they split text differently"
    if differing:
        token = mine.convert_ids_to_tokens(differing[0])
        what = f"the first id that differs is {differing[0]}, the student's {token!r}"
    raise UserError(f"model.teacher.path: {name} has another tokenizer than the student: {what}")


# -------------------------------------------------------------------------------------- dry run


@dataclass(frozen=True)
class Memory:
    """An estimate of what one worker holds, in bytes."""

    masters: float
    gradients: float
    optimizer: float
    teacher: float
    activations: float
    influence: float
    """Gradients that are compared."""

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory(config: Config, stage: str, parameters: int, model: PreTrainedModel) -> Memory:
    """Masters and gradients are fp32 and sharded, as is the optimizer's state; the teacher is
    whole; of the widest view a block keeps about 16 numbers per token and hidden unit and 8 per
    token and FFN unit for the backward, or its input alone under activation checkpointing."""
    settings, scaling = config.stages[stage], config.scaling_of(stage)
    shape, low = model.config, 2 if scaling.use_gpu else 4
    tokens = settings.batch_size * settings.max_seq_length * settings.view_lengths
    per_token = 16 * shape.hidden_size + 8 * shape.intermediate_size
    if settings.activation_checkpointing:
        per_token = shape.hidden_size
    chunk = min(tokens, settings.logits_chunk or 2048) * shape.vocab_size * 4 * 3
    share = parameters / scaling.fewest
    compared = 0
    if config.influence_interval(stage):
        compared = len(config.probes(stage)) + settings.influence.groups * len(
            config.data.remixed()
        )
    if settings.lrc is not None:
        model = to_bitnet(copy.deepcopy(model), config.model.quantization.subln)
        add_corrections(model, settings.lrc.rank)
        train_corrections_only(model)
    learnt = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return Memory(
        masters=4 * share,
        gradients=4 * learnt / scaling.fewest,
        optimizer=settings.optimizer.state_bytes(model) / scaling.fewest,
        teacher=_teacher_bytes(config, stage, model, low),
        activations=float(low * tokens * per_token * shape.num_hidden_layers + chunk),
        influence=4 * share * settings.influence.depth * compared,
    )


def _teacher_bytes(config: Config, stage: str, model: PreTrainedModel, low: int) -> float:
    """Of the teacher on one worker's device, taken to be of the student's size: its share, two of
    its layers if it is offloaded, half a byte and a scale for a weight in 4 bits, or nothing."""
    teacher, workers = config.model.teacher, config.scaling_of(stage).fewest
    if not config.stages[stage].needs_teacher or isinstance(teacher, Actors | Server):
        return 0.0
    every = sum(p.numel() for p in model.parameters())
    layers = [sum(p.numel() for p in layer.parameters()) for layer in decoder_layers(model)]
    if isinstance(teacher, InProcess):
        return low * every / (workers if teacher.sharded(every, workers) else 1)
    inside = 2.0 * low * max(layers) if isinstance(teacher, Offload) else 0.57 * sum(layers)
    return inside + low * (every - sum(layers))


def too_large(config: Config, stage: str, worker: int, peak_gb: float, said: str) -> str:
    """What to tell of a worker that ran out of memory: peak, what takes most, what to change."""
    model = outline(config)
    parameters = sum(p.numel() for p in model.parameters())
    terms = vars(memory(config, stage, parameters, model)).items()
    largest = sorted(terms, key=lambda term: -term[1])[:3]
    named = ", ".join(f"{name} {size / GB:.2g} GB" for name, size in largest)
    size = config.stages[stage].batch_size
    return (
        f"stage {stage}: worker {worker} ran out of memory at a peak of {peak_gb:.3g} GB ({said}); "
        f"by estimate the biggest parts are {named}; lower training.batch_size (now {size}, or set "
        "training.auto_batch_size=true), set training.activation_checkpointing=true, or raise "
        "scaling.num_workers"
    )


def idle_turns(config: Config, stage: str) -> str | None:
    """A sentence where workers do not share the micro-batches of a step evenly: the numbers stay
    right, but some of them wait."""
    scaling, tickets = config.scaling_of(stage), config.stages[stage].gradient_accumulation_steps
    if not config.stages[stage].total_steps or tickets % scaling.most == 0:
        return None
    turns = -(-tickets // scaling.most) * scaling.most
    return (
        f"note      {stage}: {tickets} micro-batches a step leave {1 - tickets / turns:.0%} of the "
        f"turns of {scaling.most} workers empty; a multiple of {scaling.most} as "
        "gradient_accumulation_steps would not"
    )


def plan(config: Config) -> str:
    """What `run` would do, as text; checks everything that can be checked without training."""
    config = at_commit(located(config))
    elsewhere = _elsewhere(config)
    inputs_on_hub(config)
    model = outline(config)
    parameters = sum(p.numel() for p in model.parameters())
    known = named_tokenizer(config)
    check_model(config, model, known)
    header = ("stage", "steps", "tokens", "workers", "learning rate", "memory/worker", "starts at")
    stages = expected(config, model)
    remixes = [line for name in config.stages for line in schedule_of_mixture(config, name)]
    rows = [_row(config, name, each) for name, each in stages.items()]
    checkpoints = sum(each.checkpoint_gb * each.checkpoints for each in stages.values())
    lines = [
        f"run       {config.run_dir}",
        f"model     {config.model.name}: {parameters:,} parameters"
        f" ({config.model.path or 'built from its config'}"
        f"{f' at {config.model.revision}' if config.model.revision else ''})",
        f"tokenizer {known or 'trained on the data'}",
        "data      "
        + ", ".join(f"{name} {share:.1%}" for name, share in config.data.shares().items()),
        *_teacher(config),
        f"export    {', '.join(config.export.gguf) or 'no GGUF'}"
        + (", huggingface" if config.export.huggingface else ""),
        f"storage   up to {checkpoints:.3g} GB of checkpoints",
        *_bill(config, stages),
        "",
        Table(header, rows).text(),
        *elsewhere,
        *remixes,
        *filter(None, (idle_turns(config, name) for name in config.stages)),
        *_passed_over(config),
        "",
        "nothing was trained (--dry-run)",
    ]
    return "\n".join(lines)


def _passed_over(config: Config) -> list[str]:
    """A line for every stage that will not begin with the checkpoint that was named for it."""
    pending = [name for name in config.stages if not stage_folder(config, name).complete]
    said = {name: passed_over(config, name, resume_point(config, name)) for name in pending}
    return [f"note      {name} {why}" for name, why in said.items() if why]


def _elsewhere(config: Config) -> list[str]:
    """A line where this machine cannot hold a run that is planned for GPUs elsewhere; `UserError`
    where what has to hold it cannot."""
    try:
        check_resources(config, resources())
    except UserError as error:
        if on_cluster() or config.probe or not (config.cost.gpu or config.gpu):
            raise
        return [f"note      only a plan: {error}"]
    return []


def _teacher(config: Config) -> list[str]:
    """A line about the teacher where any stage has one."""
    if not any(s.total_steps and s.needs_teacher for s in config.stages.values()):
        return []
    teacher = config.model.teacher
    if isinstance(teacher, Server):
        return [f"teacher   {teacher.url}"]
    return [f"teacher   {teacher.type}: {teacher.path or config.model.path or 'its dense stage'}"]


def _row(config: Config, name: str, each: Expected) -> tuple[str, ...]:
    stage, scaling = config.stages[name], config.scaling_of(name)
    return (
        name,
        str(stage.total_steps),
        f"{each.tokens:,}",
        "-".join(map(str, dict.fromkeys((scaling.fewest, scaling.most)))),
        f"{stage.optimizer.lr:g}" if stage.total_steps else "-",
        f"{each.memory_gb:.2g} GB",
        _resume_point(config, name),
    )


def _bill(config: Config, stages: Mapping[str, Expected]) -> list[str]:
    """Time and price of the stages that take steps, whatever is done of them already."""
    prices = config.cost.rates(config.gpu_name)
    lines = []
    for name, each in stages.items():
        rate, hours = each.tokens_per_second, each.worker_hours
        if not each.tokens:
            continue
        if rate is None or hours is None:
            lines.append(f"time      {name}: unknown; {each.how}")
            continue
        price = money(hours, prices) or "no price known"
        told = f"{rate:,.0f} tokens/s ({each.how}), {duration(each.hours)} of steps"
        lines.append(f"time      {name}: {told}, {price}")
    return lines


def expected(config: Config, model: PreTrainedModel) -> dict[str, Expected]:
    """What each stage will take. Memory is estimated, and the rate taken to be `cost.mfu` of the
    device's peak, unless `probe=true` has both measured (or the stage takes no steps)."""
    parameters = sum(p.numel() for p in model.parameters())
    found = {}
    for name, stage in config.stages.items():
        workers = config.scaling_of(name).most
        held = memory(config, name, parameters, model)
        taken, rate, how = held.total, *_assumed_rate(config, name, model, parameters)
        if config.probe and stage.total_steps:
            from bitray.pipeline.batch_size import probed  # which asks for our outline

            with ray_session():
                taken, each = probed(config, name)
            rate, how = each * workers, "measured, without communication"
        found[name] = Expected(
            tokens=stage.total_steps * stage.rows_per_step * stage.max_seq_length,
            workers=workers,
            memory_gb=taken / GB,
            tokens_per_second=rate,
            how=how,
            checkpoint_gb=(held.masters + held.optimizer) * config.scaling_of(name).fewest / GB,
            # the best one, and one more: a step before an older one goes, or in the end the final
            checkpoints=stage.keep_last + 2,
        )
    return found


def _assumed_rate(
    config: Config, name: str, model: PreTrainedModel, parameters: int
) -> tuple[float | None, str]:
    """Tokens per second of all workers of a stage, and where that comes from."""
    scaling, cost, gpu = config.scaling_of(name), config.cost, config.gpu_name
    if gpu is None and scaling.use_gpu and torch.cuda.is_available():
        gpu = torch.cuda.get_device_name()
    peak = cost.planned_flops((cost.gpu or gpu) if scaling.use_gpu else None)
    if peak is None:
        return None, "probe=true measures it"
    each = flops_per_token(model.config, parameters, config.stages[name].max_seq_length)
    return scaling.most * cost.mfu * peak / each, f"assumed, at {cost.mfu:.0%} of the peak"


def _resume_point(config: Config, name: str) -> str:
    if stage_folder(config, name).complete:
        return "complete"
    found = resume_point(config, name)
    return found.rstrip("/").rpartition("/")[2] if found else "the beginning"

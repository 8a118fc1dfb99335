"""Before a run: whether the cluster can hold it, what it will do, and what it takes."""

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass

import ray
import torch
from transformers import PreTrainedModel

from bitray.models.convert import to_bitnet
from bitray.models.families import decoder_layers
from bitray.models.low_rank import add_corrections, train_corrections_only
from bitray.pipeline.autoscaler import autoscales
from bitray.pipeline.checks import check_model, outline
from bitray.pipeline.cluster import reserved_cpus
from bitray.pipeline.config import Config
from bitray.pipeline.cost import Expected, duration, money
from bitray.pipeline.folders import (
    located,
    passed_over,
    resume_point,
    stage_folder,
)
from bitray.pipeline.material import at_commit, inputs_on_hub, named_tokenizer
from bitray.pipeline.remix import schedule_of_mixture
from bitray.pipeline.report import Table
from bitray.pipeline.session import ray_session
from bitray.settings import Passing, UserError
from bitray.training.flops import flops_per_token
from bitray.training.teacher_settings import Actors, InProcess, Offload, Server
from bitray.training.trial import resident

GB = 1e9


def on_cluster() -> bool:
    """Whether a run would be on a cluster that is there, rather than on this machine alone."""
    return ray.is_initialized() or bool(os.environ.get("RAY_ADDRESS"))


def resources() -> dict[str, float]:
    """CPUs and GPUs of the cluster, without bounds where an autoscaler may bring more, or of this
    machine where there is no cluster."""
    if not on_cluster():
        return {"CPU": float(os.cpu_count() or 1), "GPU": float(torch.cuda.device_count())}
    with ray_session():
        if autoscales():
            return {"CPU": math.inf, "GPU": math.inf}
        return {key: float(value) for key, value in ray.cluster_resources().items()}


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
    libraries: float
    """What a process has loaded before it holds any of that, on CPUs, where it counts too."""

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
        libraries=0.0 if scaling.use_gpu else resident(os.getpid()),
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
    terms = vars(memory(config, stage, parameters, model))
    del terms["libraries"]  # which no setting changes
    largest = sorted(terms.items(), key=lambda term: -term[1])[:3]
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

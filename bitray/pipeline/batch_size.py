"""The largest micro-batches that fit: tried on every worker before the stages begin."""

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import ray

from bitray.pipeline.checks import outline, teacher_outline
from bitray.pipeline.config import Config
from bitray.settings import UserError
from bitray.training.settings import TrainingSettings
from bitray.training.trial import Trial, candidates, largest, memory, peak, tried

GB = 1e9


def sized(config: Config, stages: Sequence[str]) -> Config:
    """The configuration with the micro-batches that fit, of stages that ask for it. Their global
    batches stay what they are."""
    changes: dict[str, int] = {}
    for name in stages:
        settings = config.stages[name]
        if not settings.auto_batch_size or not settings.total_steps:
            continue
        size = _largest(config, name)
        tickets = settings.rows_per_step // size
        changes[f"stages.{name}.batch_size"] = size
        changes[f"stages.{name}.gradient_accumulation_steps"] = tickets
        print(f"{name:<9} micro-batch {size} x accumulation {tickets}: the largest that fits")
    return config.override(changes) if changes else config


def probed(config: Config, stage: str) -> tuple[float, float]:
    """Bytes that a worker takes and tokens per second of one, by some steps with the stage's own
    micro-batches, where a worker would be."""
    trial = replace(_trials(config, stage)[0], timed=True)
    size = config.stages[stage].batch_size
    taken, rate = ray.get(_task(config, stage, tried).remote(trial, size, math.inf))
    if math.isinf(taken):
        raise UserError(
            f"stages.{stage}: a micro-batch of {size} rows does not fit a worker; lower "
            "batch_size, or set auto_batch_size=true or activation_checkpointing=true"
        )
    return taken, rate


def _task(config: Config, stage: str, function: Callable[..., Any]) -> Any:
    """A function as a task with what a worker of the stage has."""
    scaling = config.scaling_of(stage)
    return ray.remote(
        num_cpus=scaling.cpus_per_worker,
        num_gpus=scaling.gpus_per_worker if scaling.use_gpu else 0,
        scheduling_strategy="SPREAD",
        max_calls=1,
        max_retries=0,
    )(function)


def _largest(config: Config, stage: str) -> int:
    """The least of what fits the workers."""
    scaling, trials = config.scaling_of(stage), _trials(config, stage)
    task = _task(config, stage, _fitting)
    found: list[int | None] = ray.get(
        [task.remote(trial, scaling.gpus_per_worker) for trial in trials]
    )
    fitting = [size for size in found if size is not None]
    if len(fitting) < scaling.fewest:
        length = config.stages[stage].max_seq_length
        raise UserError(
            f"stages.{stage}: not even one row of {length} tokens fits a worker; shorten "
            "max_seq_length, set activation_checkpointing=true, or take more workers"
        )
    return min(fitting)


def _trials(config: Config, stage: str) -> list[Trial]:
    settings, scaling = config.stages[stage], config.scaling_of(stage)
    # a stage's own settings are the pipeline's; the process knows those of training alone
    given = settings.model_dump(include=set(TrainingSettings.model_fields))
    given["max_steps"] = settings.total_steps
    model = outline(config)
    teacher = teacher_outline(config) or model
    return [
        Trial(
            settings=TrainingSettings.model_validate(given),
            model=model.config.to_json_string(use_diff=False),
            teacher=config.model.teacher,
            teacher_model=teacher.config.to_json_string(use_diff=False),
            subln=None if settings.dense else config.model.quantization.subln,
            device="cuda" if scaling.use_gpu else "cpu",
            rank=rank,
            world=scaling.fewest,
        )
        for rank in range(scaling.fewest)
    ]


def _fitting(trial: Trial, share: float) -> int | None:
    """The largest micro-batch that fits a share of the GPU here, or a worker's memory; or None."""
    settings = trial.settings
    limit = memory(trial.device, trial.world) * (share if trial.device == "cuda" else 1)
    if settings.memory_limit_gb is not None:
        limit = settings.memory_limit_gb * GB
    limit *= 1 - settings.memory_margin
    sizes = candidates(settings.rows_per_step, trial.world)
    return largest(sizes, lambda size: peak(trial, size, limit) <= limit)

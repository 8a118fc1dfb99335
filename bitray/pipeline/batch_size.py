"""The largest micro-batches that fit: tried on every worker before the stages begin."""

from collections.abc import Sequence
from typing import Any

import ray

from bitray.pipeline.config import Config
from bitray.pipeline.plan import outline
from bitray.settings import UserError
from bitray.training.settings import TrainingSettings
from bitray.training.teacher_settings import Server
from bitray.training.trial import Trial, candidates, largest, memory, peak

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


def _largest(config: Config, stage: str) -> int:
    """The least of what fits the workers."""
    scaling, workers = config.scaling_of(stage), config.scaling_of(stage).fewest
    task: Any = ray.remote(
        num_cpus=scaling.cpus_per_worker,
        num_gpus=1 if scaling.use_gpu else 0,
        scheduling_strategy="SPREAD",
        max_calls=1,
        max_retries=0,
    )(_fitting)
    trials = _trials(config, stage)
    found: list[int | None] = ray.get([task.remote(trial) for trial in trials])
    fitting = [size for size in found if size is not None]
    if len(fitting) < workers:
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
    model = outline(config).config.to_json_string(use_diff=False)
    teacher = config.model.teacher
    theirs = model
    if not isinstance(teacher, Server) and teacher.path:
        another = config.override({"model.path": teacher.path, "model.config": None})
        theirs = outline(another).config.to_json_string(use_diff=False)
    return [
        Trial(
            settings=TrainingSettings.model_validate(given),
            model=model,
            teacher=teacher,
            teacher_model=theirs,
            subln=None if settings.dense else config.model.quantization.subln,
            device="cuda" if scaling.use_gpu else "cpu",
            rank=rank,
            world=scaling.fewest,
        )
        for rank in range(scaling.fewest)
    ]


def _fitting(trial: Trial) -> int | None:
    """The largest micro-batch that fits here, or None."""
    settings = trial.settings
    limit = memory(trial.device, trial.world)
    if settings.memory_limit_gb is not None:
        limit = settings.memory_limit_gb * GB
    limit *= 1 - settings.memory_margin
    sizes = candidates(settings.rows_per_step, trial.world)
    return largest(sizes, lambda size: peak(trial, size, limit) <= limit)

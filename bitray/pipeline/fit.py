"""Stages on Ray Train: one `fit()` for consecutive stages with the same scaling."""

import itertools
import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from pyarrow.fs import PyFileSystem
from ray.exceptions import RayActorError
from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import (
    WorkerGroupStartupFailedError,
    WorkerGroupStartupTimeoutError,
)

from bitray import storage
from bitray.data.stream import TicketConfig, ticket_dataset
from bitray.object_store import Patient
from bitray.pipeline.cli import causes, told
from bitray.pipeline.config import Config
from bitray.pipeline.elastic import use_policy
from bitray.pipeline.faults import OUT_OF_MEMORY
from bitray.pipeline.groups import Scaling
from bitray.pipeline.interrupt import in_thread
from bitray.pipeline.plan import too_large
from bitray.pipeline.streams import data_state
from bitray.pipeline.worker import Job, work
from bitray.retries import StorageGone, may_pass
from bitray.settings import Passing, UserError

START_SECONDS = 10.0
"""How long Ray Train waits for the nodes of all workers before it looks again at how many there
are (Ray's own: 60); it does so until `scaling.patience_seconds` are over."""
STARTS = (WorkerGroupStartupFailedError, WorkerGroupStartupTimeoutError)


def groups(config: Config, stages: list[str]) -> Iterator[tuple[Scaling, tuple[str, ...]]]:
    """Consecutive stages with the same scaling: they share workers and their start-up."""
    for scaling, names in itertools.groupby(stages, key=config.scaling_of):
        yield scaling, tuple(names)


def _storage_of(uri: str) -> dict[str, Any]:
    """Where Ray Train keeps its own state. Of object storage it gets a file system that knows the
    endpoint and tries again."""
    if not storage.is_remote(uri):
        return {"storage_path": uri}
    filesystem, path = storage.located(uri)
    return {"storage_path": path, "storage_filesystem": PyFileSystem(Patient(filesystem))}


@contextmanager
def storage_errors(run_dir: str) -> Iterator[None]:
    """Ray Train's own failure to reach the run's storage, as the sentence that ours is."""
    try:
        yield
    except Exception as error:
        if storage.is_remote(run_dir) and any(may_pass(each) for each in causes(error)):
            raise StorageGone(f"{run_dir}: the storage does not answer ({error})") from error
        raise


def fit(job: Job, scaling: Scaling) -> str | None:
    """Train the job's stages. Returns the stage in which somebody stopped it, or None at its end.
    `UserError` for what the workers found that a user can put right, `Passing` where they failed
    once more than `scaling.max_failures` times.

    Where workers leave to be more of them, or off a node that goes, others start at once.
    """
    os.environ.setdefault("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", f"{START_SECONDS:g}")
    os.environ.setdefault("RAY_TRAIN_PREEMPTION_POLL_INTERVAL_S", "1")
    use_policy()
    uri, lost = storage.join(job.config.run_dir, OUT_OF_MEMORY), 0
    if storage.exists(uri):
        storage.remove(uri)
    while True:
        try:
            with storage_errors(job.config.run_dir):
                result: Any = in_thread(_trainer(job, scaling).fit)
        except TrainingFailedError as error:
            raise _failure(job, scaling, error) from error
        except RayActorError as error:  # Ray Train's own controller; its workers go with it
            lost += 1
            if lost > scaling.max_failures:
                raise Passing(f"Ray Train's controller was lost {lost} times: {error}") from error
            continue
        outcome: dict[str, Any] = result.return_value
        if "out_of_memory" in outcome:
            storage.remove(uri)
            raise UserError(too_large(job.config, **outcome["out_of_memory"]))
        if "error" in outcome:
            raise (Passing if outcome["passing"] else UserError)(outcome["error"])
        if "again" not in outcome:
            return outcome.get("stopped")


def _failure(job: Job, scaling: Scaling, error: TrainingFailedError) -> UserError:
    """One sentence of what ended the run, with a file that has all of it."""
    if said := told(error):
        passing = any(isinstance(each, Passing | OSError) for each in causes(error))
        return Passing(said) if passing else UserError(said)
    uri = storage.join(job.config.run_dir, "failure.txt")
    storage.write_text(uri, str(error))
    failures = getattr(error, "worker_failures", {})
    last = (str(next(iter(failures.values()), error)).strip().splitlines() or ["?"])[-1]
    what = f"Ray Train's controller failed: {last}"
    if failures:
        times = f"more than {scaling.max_failures} times (scaling.max_failures)"
        what = f"the workers failed {times}, at last worker {next(iter(failures))}: {last}"
    elif isinstance(getattr(error, "controller_failure", None), STARTS):
        patience = f"{scaling.patience_seconds:g} s (scaling.patience_seconds)"
        what = f"no {scaling.fewest} workers could be started in {patience}"
    return Passing(f"{what}; all of it is in {uri}, and the same command continues")


def _trainer(job: Job, scaling: Scaling) -> TorchTrainer:
    # Ray annotates older classes, which do not know all of these
    limits: Any = {
        "max_failures": scaling.max_failures,
        # tries to place the workers
        "controller_failure_limit": max(3, math.ceil(scaling.patience_seconds / START_SECONDS)),
    }
    train_loop: Any = work  # Ray's annotation forgets that it may return something
    shape: Any = {
        "num_workers": scaling.num_workers,
        "placement_strategy": scaling.placement,
        "label_selector": scaling.worker_labels or None,
    }
    return TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            use_gpu=scaling.use_gpu, resources_per_worker=scaling.per_worker, **shape
        ),
        run_config=RunConfig(
            name=f"{job.fingerprint[:12]}-{'-'.join(job.stages)}",
            **_storage_of(storage.join(job.config.run_dir, "ray_train")),
            failure_config=FailureConfig(**limits),
        ),
        datasets={
            name: ticket_dataset(
                job.streams[name], partial(data_state, job.config, name, job.claim.epoch)
            )
            for name in job.stages
            if name in job.streams
        },
        dataset_config=TicketConfig(),
    )

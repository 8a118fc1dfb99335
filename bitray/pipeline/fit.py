"""Stages on Ray Train: one `fit()` for consecutive stages with the same scaling."""

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from bitray import checkpoint, storage
from bitray.data.manifest import Manifest
from bitray.data.mixture import Mixture, StageMixture
from bitray.data.plan import SourceSize
from bitray.data.stream import TicketConfig, TicketStream, ticket_dataset
from bitray.data.tickets import least_lead
from bitray.pipeline.cli import causes
from bitray.pipeline.config import Config, Scaling
from bitray.pipeline.folders import resume_point, skipped_by_name
from bitray.pipeline.interrupt import in_thread
from bitray.pipeline.material import RowKind
from bitray.pipeline.worker import Job, work
from bitray.retries import StorageGone, may_pass
from bitray.settings import UserError

BUNDLE = 32
"""Tickets that travel together to a worker, at most."""
LEAD = 16
"""Steps that a decision about the mixture leads by. Many workers get smaller bundles instead of
earlier decisions, so that the rows after a decision do not depend on how many workers there are;
only with more than LEAD / 2 workers to a ticket there is no such bundle."""
CONTROLLER_FAILURES = 3
"""Tries to open the data and start the workers; Ray's default is to try for ever."""


def groups(config: Config, stages: list[str]) -> Iterator[tuple[Scaling, tuple[str, ...]]]:
    """Consecutive stages with the same scaling: they share workers and their start-up."""
    for scaling, names in itertools.groupby(stages, key=config.scaling_of):
        yield scaling, tuple(names)


def stage_mixture(config: Config, stage: str, manifest: Manifest) -> StageMixture:
    """What a stage trains on; its sources continue where those of the stage before it end."""
    settings, scaling = config.stages[stage], config.scaling_of(stage)
    trained = [name for name, each in config.stages.items() if each.total_steps]
    before = trained[: trained.index(stage)]
    influence, interval = settings.influence, config.influence_interval(stage)
    bounds = (influence.min_weight, influence.max_weight)
    tickets, workers = settings.gradient_accumulation_steps, scaling.num_workers
    # Training begins when the first bundle of every worker can be planned: well within a window.
    early = manifest.window // (4 * settings.batch_size * workers)
    bundle = max(1, min(BUNDLE, early, LEAD // 2 * tickets // workers))
    weights, *phases = _phases(config, stage)
    return StageMixture(
        seed=config.data.seed,
        manifest=manifest.identity(),
        sizes=manifest.sizes(),
        parts=manifest.parts,
        length=manifest.length,
        weights=weights[1],
        phases=tuple(phases),
        max_epochs=config.data.epochs() or None,
        steps=settings.total_steps,
        rows_per_ticket=settings.batch_size,
        tickets_per_step=tickets,
        bundle=bundle,
        max_workers=workers,
        lead=max(LEAD, least_lead(bundle, workers, tickets)),
        period=interval,
        first_decision=influence.first(interval) if interval else None,
        bounds=bounds if interval else (0.0, 1.0),
        after=before[-1] if before and before[-1] not in skipped_by_name(config) else None,
    )


def _phases(config: Config, stage: str) -> list[tuple[int, dict[str, float]]]:
    """First step and mixture of every phase of a stage that has another one than the last."""
    settings, shares = config.stages[stage], config.data.shares()
    phases, ends = settings.curriculum.phases, settings.curriculum.ends(settings.total_steps)
    found = [] if phases else [(0, shares)]
    for first, end, phase in zip([0, *ends], ends, phases, strict=False):
        mixture = shares if phase.mixture is None else phase.mixture
        if end > first and not (found and found[-1][1] == mixture):
            found.append((first, mixture))
    return found


def grown(
    flows: Mapping[str, TicketStream], sizes: Mapping[str, dict[str, SourceSize]]
) -> dict[str, TicketStream]:
    """The streams with what there is by now of the sources of each manifest."""
    mixtures = {
        name: replace(flow.mixture, sizes=sizes[flow.mixture.manifest])
        for name, flow in flows.items()
    }
    return {name: replace(flows[name], mixture=mixture) for name, mixture in mixtures.items()}


def check_enough(flows: Mapping[str, TicketStream]) -> None:
    """`UserError` if `max_epochs` leaves a stage too few rows, as far as can be known by now."""
    opened: dict[str, Mixture] = {}
    for name, flow in flows.items():
        stage = flow.mixture
        cursors = opened[stage.after].continued(stage) if stage.after in opened else None
        try:
            opened[name] = Mixture.opened(stage, 0, None, cursors)
        except UserError as error:
            raise UserError(f"stages.{name}: {error}") from None


def streams(
    config: Config,
    manifests: Mapping[RowKind, Manifest],
    prepared: Mapping[RowKind, str],
    actor: str,
) -> dict[str, TicketStream]:
    """The stream of every stage that takes steps."""
    return {
        name: TicketStream(
            name=name,
            mixture=stage_mixture(config, name, manifests[RowKind.of(stage)]),
            prepared=prepared[RowKind.of(stage)],
            actor=actor,
            readers=config.scaling_of(name).readers,
            reader_cpus=config.scaling_of(name).cpus_per_reader,
        )
        for name, stage in config.stages.items()
        if stage.total_steps
    }


def reserved_cpus(scaling: Scaling) -> float:
    """What workers and readers take."""
    workers = scaling.num_workers * scaling.cpus_per_worker
    return workers + scaling.readers * scaling.cpus_per_reader


def data_state(config: Config, stage: str) -> dict[str, Any] | None:
    """Where a stage's data is to continue; asked at every start of the workers."""
    found = resume_point(config, stage)
    if found is None or not config.stages[stage].resume.load_data_state:
        return None
    held: dict[str, Any] | None = checkpoint.load_state(found)["data"]
    return held


def _storage_of(uri: str) -> dict[str, Any]:
    """Where Ray Train keeps its own state. Of object storage it gets our file system, which knows
    the endpoint and tries again."""
    if not storage.is_remote(uri):
        return {"storage_path": uri}
    filesystem, path = storage.located(uri)
    return {"storage_path": path, "storage_filesystem": filesystem}


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
    `UserError` for what the workers found that a user can put right."""
    limits: Any = {  # Ray annotates an older class, which does not know the second
        "max_failures": scaling.max_failures,
        "controller_failure_limit": CONTROLLER_FAILURES,
    }
    train_loop: Any = work  # Ray's annotation forgets that it may return something
    trainer = TorchTrainer(
        train_loop,
        train_loop_config={"job": job},
        torch_config=TorchConfig(backend="nccl" if scaling.use_gpu else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=scaling.num_workers,
            use_gpu=scaling.use_gpu,
            resources_per_worker={
                "CPU": scaling.cpus_per_worker,
                **({"GPU": 1} if scaling.use_gpu else {}),
            },
        ),
        run_config=RunConfig(
            name=f"{job.fingerprint[:12]}-{'-'.join(job.stages)}",
            **_storage_of(storage.join(job.config.run_dir, "ray_train")),
            failure_config=FailureConfig(**limits),
        ),
        datasets={
            name: ticket_dataset(job.streams[name], partial(data_state, job.config, name))
            for name in job.stages
            if name in job.streams
        },
        dataset_config=TicketConfig(),
    )
    with storage_errors(job.config.run_dir):
        result: Any = in_thread(trainer.fit)
    outcome: dict[str, Any] = result.return_value
    if "error" in outcome:
        raise UserError(outcome["error"])
    return outcome.get("stopped")

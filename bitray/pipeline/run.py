"""`run(config)`: the whole road, from text to an exported ternary model."""

import os
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import ray
from ray.util.queue import Queue
from transformers import PreTrainedModel

from bitray import lease, storage
from bitray.data.actor import mixture_actor
from bitray.data.manifest import Manifest, digest
from bitray.events import FOLDER, Events
from bitray.lease import Claim
from bitray.pipeline.batch_size import sized
from bitray.pipeline.checks import check_model, check_teacher, outline
from bitray.pipeline.cli import told
from bitray.pipeline.cluster import preflight, reserved_cpus
from bitray.pipeline.config import Config
from bitray.pipeline.console import console
from bitray.pipeline.cost import ESTIMATE, dump
from bitray.pipeline.finish import Result, finish
from bitray.pipeline.fit import fit, groups
from bitray.pipeline.folders import located, skipped_by_name, stage_folder
from bitray.pipeline.groups import RowKind, Scaling
from bitray.pipeline.identity import claim
from bitray.pipeline.interrupt import stoppable
from bitray.pipeline.material import (
    Material,
    at_commit,
    inputs_on_hub,
    named_tokenizer,
    pin,
    prepared_beside,
)
from bitray.pipeline.plan import (
    check_resources,
    expected,
    resources,
)
from bitray.pipeline.report import Table
from bitray.pipeline.saving import STOP
from bitray.pipeline.session import ray_session
from bitray.pipeline.streams import check_enough, grown, streams
from bitray.pipeline.worker import Job
from bitray.retries import patient
from bitray.settings import UserError
from bitray.training import goodput

START_PATIENCE_S = 15.0
"""Before anything has begun, storage that does not answer is a wrong address."""


def run(config: Config) -> Result:
    """Prepare data, train the stages that are not complete, evaluate, export, report.

    The same configuration again continues where it stopped, or says where its result lies.
    `UserError` for anything that the user can put right, as early as it can be known.
    """
    began, config = time.time(), at_commit(located(config))
    inputs_on_hub(config)
    model = outline(config)
    check_model(config, model, named_tokenizer(config))
    with (
        patient(START_PATIENCE_S),
        lease.held(config.run_dir) as held,
        patient(config.resume.storage_patience),
        audited(held) as events,
        ray_session(),
    ):
        return _run(config, held, events, model, began)


def _run(
    config: Config, held: Claim, events: Events, model: PreTrainedModel, began: float
) -> Result:
    check_resources(config, resources())
    preflight(config)
    wanted = expected(config, model)  # once it is known that a probe finds its place
    material = Material(config)
    if named_tokenizer(config) is None:  # it has not been seen before
        check_teacher(config, material.load_tokenizer())
    if config.resume.fresh:
        _check_held_out(material.open())  # nothing goes for a run that cannot begin
        _clear(config.run_dir)
        events.write("fresh")
    parts = {str(kind): job.parts for kind, job in material.jobs.items()}
    fingerprint = claim(config, parts, events)
    pin(config.run_dir, material.on_hub)
    goodput.begin(config.run_dir, began)
    estimate = storage.join(config.run_dir, ESTIMATE)
    if config.probe or not storage.exists(estimate):
        storage.write_json(estimate, dump(wanted))
    with stoppable(config.run_dir), console() as lines:
        stopped = train(config, material, fingerprint, lines, events)
    held.check()
    if stopped:
        events.write("stop", stage=stopped)
        said = f"stopped in {stopped}; the same command continues it"
        return Result(config.run_dir, stopped=True, lines=[said])
    result = finish(config, fingerprint)
    events.write("end")
    return result


@contextmanager
def audited(held: Claim) -> Iterator[Events]:
    """The driver's events; how it fails is one of them. An attempt is an epoch of the lease."""
    events = Events(held, "driver")
    job = os.environ.get("RAY_JOB_SUBMISSION_ID") or os.environ.get("RAY_JOB_ID")
    events.write("lease", host=socket.gethostname(), pid=os.getpid(), submission=job)
    try:
        yield events
    except BaseException as error:
        with suppress(OSError, UserError):
            events.write("failed", reason=told(error) or repr(error))
        raise
    finally:
        events.close()


def _clear(run_dir: str) -> None:
    """Remove all that a run left, but who held it and what was done to it."""
    top = storage.absolute(run_dir)
    files = storage.list_files(run_dir) if storage.exists(run_dir) else []
    names = {one.uri.removeprefix(top).strip("/").split("/")[0] for one in files}
    for name in names - {lease.FOLDER, FOLDER}:
        storage.remove(storage.join(run_dir, name))


def train(
    config: Config, material: Material, fingerprint: str, lines: Queue, events: Events
) -> str | None:
    """Train the stages that are not complete, beside the preparation of what they need later; the
    one in which somebody stopped, or None."""
    if not config.resume.skip_completed:
        _check_held_out(material.open())  # before anything goes
        for stage in config.stages:
            storage.remove(storage.join(config.run_dir, f"{stage}_checkpoint"))
    left_out = skipped_by_name(config)
    pending = []
    for stage in config.stages:
        folder = stage_folder(config, stage)
        if folder.complete:
            print(f"{stage:<9} is complete: {folder.final}")
        elif stage in left_out:
            print(f"{stage:<9} is left out: a later stage's checkpoint was named")
        else:
            pending.append(stage)
    if not pending:
        return None
    manifests = material.open()
    _check_held_out(manifests)
    config = sized(config, pending)
    held = events.claim
    name = f"bitray-mixture-{digest([config.run_dir, fingerprint, str(held.epoch)])[:16]}"
    flows = streams(config, manifests, material.folders, name)
    check_enough(flows)
    journals = storage.join(config.run_dir, "mixture")
    actor = mixture_actor(name, journals, held, config.resume.storage_patience)
    tokenizer, folders = material.tokenizer, material.folders
    jobs = [
        (Job(config, stages, fingerprint, tokenizer, folders, flows, lines, held), how)
        for how, stages in groups(config, pending)
    ]
    try:
        return _train_beside(material, actor, jobs, events)
    finally:
        ray.kill(actor)  # else it lives as long as anything that refers to it


def _train_beside(
    material: Material, actor: Any, jobs: Sequence[tuple[Job, Scaling]], events: Events
) -> str | None:
    """Train while the rest is prepared; what stops the one stops the other."""
    flag = storage.join(material.config.run_dir, STOP)
    flows, skipped = jobs[0][0].streams, dict[str, str]()

    def tell(known: Mapping[RowKind, Manifest]) -> None:
        for file, why in skipped_files(known).items() - skipped.items():
            skipped[file] = why
            events.write("skipped", path=file, reason=why)
        sizes = {manifest.identity(): manifest.sizes() for manifest in known.values()}
        check_enough(grown(flows, sizes))
        ray.get(actor.prepared.remote(sizes))

    def stop() -> None:
        storage.write_text(flag, "the preparation has stopped\n")
        ray.get(actor.ended.remote())

    tell(material.known)
    reserved = max(reserved_cpus(how) for _, how in jobs)
    with prepared_beside(material, reserved, tell, stop, partial(storage.exists, flag)) as errors:
        for job, scaling in jobs:
            stopped = fit(job, scaling)
            if errors:
                storage.remove(flag)
                raise errors[0]
            if stopped:
                return stopped
    return None


def skipped_files(known: Mapping[RowKind, Manifest]) -> dict[str, str]:
    """Files that could not be read, and why."""
    sources = (source for manifest in known.values() for source in manifest.sources.values())
    return {file: why for source in sources for file, why in source.skipped.files.items()}


def _check_held_out(manifests: dict[RowKind, Manifest]) -> None:
    """The longest rows are evaluated on; a source without any is told, all without is refused."""
    manifest = manifests[max(manifests)]
    without = [
        name for name, source in manifest.sources.items() if not source.opened("validation").rows
    ]
    if len(without) == len(manifest.sources):
        raise UserError(
            "data.split.validation: no source has a held-out document; give more text or raise it"
        )
    if without:
        print(f"note: no held-out documents of {', '.join(without)}; they are not evaluated")


def prepare_only(config: Config) -> Table:
    """Prepare the rows of all stages of a `located` configuration; their counts."""
    with ray_session():
        material = Material(config)
        pin(config.run_dir, material.on_hub)
        manifests = material.prepare()
    header = ("source", "length", "documents", "tokens", "rows", "padding", "cut", "skipped")
    rows = [
        (
            name,
            str(kind),
            f"{sum(c.documents for c in source.splits.values()):,}",
            f"{sum(c.tokens for c in source.splits.values()):,}",
            f"{sum(c.rows for c in source.splits.values()):,}",
            f"{manifest.padding([name]):.2%}",
            f"{sum(c.truncated for c in source.splits.values()):,}",
            f"{source.skipped.count:,}",
        )
        for kind, manifest in manifests.items()
        for name, source in manifest.sources.items()
    ]
    return Table(header, rows)

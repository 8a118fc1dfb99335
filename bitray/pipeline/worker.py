"""What one Ray Train worker does: the stages it was given, one after the other, in one group."""

import errno
import resource
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import ray
import ray.train
import ray.train.torch
import torch
from ray.exceptions import RayTaskError
from ray.train.v2._internal.execution.context import get_train_context
from ray.util.queue import Queue
from transformers import PreTrainedTokenizerBase

from bitray import checkpoint, storage
from bitray.data.manifest import digest, read_manifest
from bitray.data.shards import Shards, held_out
from bitray.data.stream import DataEnded, TicketStream
from bitray.lease import Claim
from bitray.models.isolation import check_documents_isolated
from bitray.models.loading import load_tokenizer, model_files
from bitray.models.losses import LossModel
from bitray.pipeline.cli import causes, told
from bitray.pipeline.cluster import room_for_another
from bitray.pipeline.config import Config
from bitray.pipeline.console import Say, speaking
from bitray.pipeline.evaluations import HeldOut, batches_of
from bitray.pipeline.faults import OUT_OF_MEMORY, Hung, account, is_out_of_memory
from bitray.pipeline.feeds import Feeds
from bitray.pipeline.folders import (
    StageFolder,
    passed_over,
    resume_point,
    taken_over,
    teacher_of,
)
from bitray.pipeline.groups import RowKind, Scaling
from bitray.pipeline.remix import few_updates, remixing
from bitray.pipeline.remote_teacher import RemoteTeacher, pool, served
from bitray.pipeline.saving import STOP, Checkpoints, Rewind, Watch
from bitray.pipeline.sinks import RayMetrics, run_name, sinks_of
from bitray.pipeline.student import Student
from bitray.retries import patient
from bitray.settings import Passing, UserError
from bitray.training import goodput, state
from bitray.training.flops import flops_per_token
from bitray.training.goodput import Clock, Ledger
from bitray.training.influence import Influence
from bitray.training.loop import Every, Loop, autocast_for, mean_loss, seed_of
from bitray.training.metrics import Sink, close_all
from bitray.training.parallel import (
    all_gather_objects,
    from_rank_zero,
    on_rank_zero,
    parallelize,
    with_losses,
    world,
)
from bitray.training.state import Position
from bitray.training.teacher import Teacher, open_teacher
from bitray.training.teacher_settings import Actors, Server
from bitray.training.watch import Watchdog

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
"""What trying again does not help against."""


@dataclass(frozen=True)
class Job:
    """What the driver decided; the same on every worker and after every restart."""

    config: Config
    stages: tuple[str, ...]
    fingerprint: str
    tokenizer: str
    prepared: dict[RowKind, str]
    """Where the prepared rows of each kind lie."""
    streams: dict[str, TicketStream]
    lines: Queue
    """What is said there is printed by the driver."""
    claim: Claim
    """The lease that all of them write under."""


def work(arguments: dict[str, Any]) -> dict[str, Any]:
    """Entry point of `TorchTrainer`. What a user can put right is returned, not raised: starting
    the worker group again would not help. `again`: others are to go on at once."""
    job: Job = arguments["job"]
    uri = storage.join(job.config.run_dir, OUT_OF_MEMORY)
    if from_rank_zero(partial(storage.exists, uri)):
        return {"out_of_memory": storage.read_json(uri)}
    clock = Clock()
    feeds = Feeds(job.config, job.stages, job.streams, job.claim.epoch)
    with speaking(job.lines) as say, patient(job.config.resume.storage_patience):
        try:
            ledger = on_rank_zero(partial(Ledger, job.config.run_dir, clock))
            for name in job.stages:
                stage = Stage(job, name, ray.train.torch.get_device(), say, clock, ledger, feeds)
                if not stage.folder.complete and not stage.run():
                    asked = storage.exists(storage.join(job.config.run_dir, STOP))
                    return {"stopped" if asked else "again": name}
        except Rewind:
            raise
        except (UserError, FloatingPointError) as error:
            passing = any(isinstance(each, Passing) for each in causes(error))
            return {"error": told(error) or str(error), "passing": passing}
        except OSError as error:
            if error.errno not in FULL:
                raise
            full = f"{job.config.run_dir}: {error.strerror}"
            full += "; make room, and the same command continues"
            return {"error": full, "passing": True}
        except (RuntimeError, MemoryError) as error:
            if is_out_of_memory(error):  # raised, so that no other worker waits for this one
                peak = peak_memory_gb(ray.train.torch.get_device())
                storage.write_json(uri, account(name, error, peak))
            raise
    return {}


@dataclass
class Stage:
    """One stage on one worker."""

    job: Job
    name: str
    device: torch.device
    say: Say
    clock: Clock
    """Where this worker's time goes."""
    ledger: Ledger | None
    """Keeps the clock of rank 0."""
    feeds: Feeds
    files: dict[str, bytes] = field(init=False)
    """What describes the model in every checkpoint."""
    own: RayMetrics = field(init=False)
    """Gauges of this worker's own metrics."""
    influence: Influence | None = None

    def __post_init__(self) -> None:
        self.config = self.job.config
        self.settings = self.config.stages[self.name]
        self.folder = StageFolder(self.config.run_dir, self.name)
        self.autocast = autocast_for(self.device, self.settings.precision)
        self.checkpoints = Checkpoints(
            self.folder, self.job.claim, self.settings.keep_last, self.say
        )
        self.shards = _shards(self.job.prepared[RowKind.of(self.settings)])
        longest = _shards(self.job.prepared[max(self.job.prepared)])
        # Of the longest rows in the run, so that the losses of its stages compare.
        rows = held_out(longest, "validation", self.config.evaluation.rows)
        batches = batches_of(rows, self.settings.batch_size)
        self.held_out = HeldOut(
            self.config.run_dir, batches, self.device, self.autocast, self.clock
        )

    def run(self) -> bool:
        """From the predecessor, or from the stage's newest checkpoint, to its end; False if it was
        stopped on the way."""
        self.own = RayMetrics(run_name(self.config), worker=str(world()[0]))
        share = self.config.scaling_of(self.name).gpus_per_worker
        if self.device.type == "cuda":  # on CPUs "high" may mean bf16
            torch.cuda.set_per_process_memory_fraction(share)  # the rest is somebody else's
            torch.set_float32_matmul_precision("high" if self.settings.tf32 else "highest")
        torch.manual_seed(seed_of(self.settings.seed, self.name))
        tokenizer = self.tokenizer()
        student = Student(
            self.config, self.name, self.shards, self.held_out, self.device, self.autocast, self.say
        )
        model, strength = student.make(tokenizer)
        self.files = model_files(model, tokenizer)
        wrapped = with_losses(model, self.settings, self.device)
        check_documents_isolated(model, self.device)
        scaling = self.config.scaling_of(self.name)
        parallelize(wrapped, self.settings, self.device, scaling.sharding == "hybrid")
        loop, watch = self.loop(wrapped, strength), Watch(self.job.claim)
        # What `ray.train.get_preemption_info()` gives, which is a collective through an actor.
        notice = get_train_context().preemption_context
        loop.stop_requested = lambda: watch.stop or notice.preemption_info is not None
        asked = loop.problem_with
        loop.problem_with = lambda batches: watch.problem or asked(batches)
        try:
            self.train(loop)
            if loop.at_end:
                self.finish(loop)  # also where somebody asked to stop in the last step
            self.checkpoints.wait()
        except FloatingPointError as error:
            self.checkpoints.once_more(loop, error)
        finally:
            watch.close()
            self.checkpoints.close()
        self.own.close()
        on_rank_zero(partial(close_all, loop.sinks))
        return not loop.stopped

    def train(self, loop: Loop) -> None:
        """The steps that are left."""
        if not loop.at_end:
            tickets = self.feeds.of(self.name, loop.data_step)
            remote = loop.teacher if isinstance(loop.teacher, RemoteTeacher) else None
            asked = remote.asked(tickets) if remote else tickets
            watchdog = Watchdog(
                self.config.scaling_of(self.name).hang_seconds,
                Hung(self.config.run_dir, self.name, self.say),
            )
            around = Every(1, watchdog.ended), Every(1, watchdog.begins)
            loop.hooks = [around[0], *loop.hooks, around[1]]
            try:
                loop.run(asked)
            except DataEnded:  # preparing it has failed, or was stopped as this is
                loop.stopped = True
                self.checkpoints.wait()
                here = self.folder.step(loop.position.step)
                if loop.position.step and not from_rank_zero(lambda: checkpoint.is_complete(here)):
                    self.on_save(loop)
            finally:
                watchdog.close()
                if remote:
                    remote.close()
            asked.close()
            tickets.close()
            if not loop.stopped:
                self.feeds.open_next(self.name)

    # ---------------------------------------------------------------------------- beginning

    def loop(self, model: LossModel, strength: float) -> Loop:
        """The loop at the place where it is to continue."""
        settings = self.settings
        optimizer = settings.optimizer.build(model)
        found = from_rank_zero(
            lambda: resume_point(self.config, self.name, self.checkpoints.pass_over)
        )
        position, data = self.place(found, model, optimizer, strength)
        loop = Loop(
            stage=self.name,
            model=model,
            optimizer=optimizer,
            settings=settings,
            device=self.device,
            autocast=self.autocast,
            teacher=self.teacher(model.model.config.vocab_size),
            position=position,
            hooks=[
                Every(settings.eval_every, self.on_evaluate, "evaluation"),
                Every(settings.log_every, self.on_log),
                # last: what is told of a step goes with a checkpoint of it
                Every(settings.save_every, self.on_save, "checkpoint"),
            ],
            sinks=on_rank_zero(partial(self.sinks, found, position)) or (),
            say=self.say,
            data_step=data["step"] if data else 0,
            sources=tuple(self.config.data.sources),
            clock=self.clock,
            mfu_per_rate=self.mfu_per_rate(model),
            on_worker=self.on_worker,
            on_spike=partial(self.checkpoints.spiked, rewind=settings.loss_spike.rewind),
            left_out=from_rank_zero(self.folder.left_out),
        )
        self.influence = remixing(
            self.config,
            self.name,
            self.shards,
            on_decision=self.decided,
            current=self.weights,
            say=self.say,
        )
        if isinstance(loop.teacher, RemoteTeacher):
            loop.problem_with = loop.teacher.problem
        if self.influence is not None:
            held = checkpoint.load_state(found).get("influence") if data and found else None
            if held:  # else it was off until now
                self.influence.resume(loop, held)
            # first: a decision has to be taken before a checkpoint of the same step
            loop.hooks = [Every(1, self.influence, "influence"), *loop.hooks]
        return loop

    def place(
        self,
        found: str | None,
        model: LossModel,
        optimizer: torch.optim.Optimizer,
        strength: float,
    ) -> tuple[Position, dict[str, Any] | None]:
        """Where the loop is to continue: in a checkpoint that was `found`, or at the beginning."""
        position, data = Position(strength=strength, initial_strength=strength), None
        if found:
            epoch = self.job.claim.epoch
            flags = from_rank_zero(partial(taken_over, self.config, self.name, found, epoch))
            position, data = state.resume(found, model, optimizer, flags, self.say)
        begins = partial(
            self.checkpoints.note,
            "resume", step=position.step, directory=found, data_step=data["step"] if data else 0,
            workers=world()[1], log_every=self.settings.log_every,
            prepared=self.job.prepared[RowKind.of(self.settings)],
        )  # fmt: skip
        on_rank_zero(begins)
        return position, data

    def ask(self, method: str, *given: Any) -> Any:
        """What the mixture actor answers about this stage. Its error as it was raised there: Ray's
        own account of it cannot be sent to the other workers."""
        actor: Any = ray.get_actor(self.job.streams[self.name].actor)
        try:
            return ray.get(getattr(actor, method).remote(self.name, *given))
        except RayTaskError as error:
            raise error.cause from None

    def decided(
        self, step: int, weights: Mapping[str, float] | None, notes: Mapping[str, Any]
    ) -> None:
        """Have a decision about the mixture recorded."""

        def record() -> None:
            self.ask("set_weights", step, weights, notes)
            self.checkpoints.note("decision", step=step, weights=weights and dict(weights))

        on_rank_zero(record)

    def weights(self, step: int) -> dict[str, float]:
        """Of the sources that are remixed, what a decision of this step goes on from."""
        known = from_rank_zero(partial(self.ask, "current", step))
        return {name: known[name] for name in self.config.data.remixed()}

    def sinks(self, found: str | None, position: Position) -> Sequence[Sink]:
        """Where metrics go; rank 0 asks, and says how the stage begins."""
        total = self.settings.total_steps
        if total:
            begins = f"continues from {found}" if found else "begins"
            self.say(f"{self.name:<9} {begins}, step {position.step}/{total}, {world()[1]} workers")
            notices = (
                passed_over(self.config, self.name, found),
                self.settings.schedule.notice(total),
                few_updates(self.config, self.name),
            )
            for notice in filter(None, notices):
                self.say(f"{self.name:<9} {notice}")
        run_id = digest([self.config.run_dir, self.job.fingerprint])[:16]  # the same after restarts
        assert self.ledger is not None
        found_sinks = sinks_of(self.config, self.name, position.step, run_id, self.say)
        return [*found_sinks, self.ledger]

    def mfu_per_rate(self, model: LossModel) -> float | None:
        """What to multiply tokens per second with; None where the device's peak is not known."""
        peak = self.config.cost.peak_flops(self.device)
        if peak is None:
            return None
        parameters = sum(p.numel() for p in model.model.parameters())
        length = self.settings.max_seq_length
        return flops_per_token(model.model.config, parameters, length) / (peak * world()[1])

    def on_worker(self, metrics: dict[str, float]) -> None:
        """This worker's own metrics into its own gauges."""
        memory = {"worker/peak_memory_gb": peak_memory_gb(self.device)}
        self.own.write(self.name, 0, {**metrics, **memory})

    def tokenizer(self) -> PreTrainedTokenizerBase:
        """As the driver found it."""
        name = self.job.tokenizer
        return load_tokenizer(name, self.config.model.revision_of(name))

    def teacher(self, vocabulary: int) -> Teacher | None:
        """The teacher, if any objective asks for one."""
        if not (self.settings.total_steps and self.settings.needs_teacher):
            return None
        wanted = self.config.model.teacher
        if isinstance(wanted, Server):
            return served(wanted, self.tokenizer(), vocabulary, self.device)
        path = teacher_of(self.config)
        revision = self.config.model.revision_of(path)
        if isinstance(wanted, Actors):
            return pool(wanted, path, self.settings.asked_at, self.device, revision)
        return open_teacher(wanted, path, self.device, self.autocast, revision)

    # ----------------------------------------------------------------------------- side work

    def on_log(self, loop: Loop) -> None:
        """What the sources' weights are, how often each has been gone through, and where the run's
        time goes."""

        def progress() -> dict[str, float]:
            assert self.ledger is not None
            sources = self.ask("sources", loop.data_step)
            told = {
                f"mixture/{what}_{name}": value
                for what, each in sources.items()
                for name, value in each.items()
            }
            return {**told, **self.ledger.metrics(self.settings.save_every)}

        loop.write(on_rank_zero(progress) or {})

    def on_evaluate(self, loop: Loop) -> None:
        """Held-out losses on the way; a new best is kept. The end has its own evaluation."""
        if loop.stopped or loop.at_end:
            return
        rows = -(-self.settings.eval_rows // self.settings.batch_size)
        losses = self.held_out.losses(loop.model, rows)
        self.note(loop, losses)
        loop.watch(mean_loss(losses))
        if loop.at_end and world()[0] == 0:
            self.say(f"{self.name:<9} ends at step {loop.position.step}: {loop.position.ended}")

    def on_save(self, loop: Loop) -> None:
        """A checkpoint of this step, also of the last: the evaluation after it may fail. Old ones
        go."""
        if loop.stopped or self.checkpoints.possible(loop):
            self.save(loop, self.folder.step(loop.position.step))
            scaling = self.config.scaling_of(self.name)
            if world()[1] < scaling.most and not (loop.stopped or loop.at_end):
                # a checkpoint is where nothing is lost by it
                loop.stopped = from_rank_zero(partial(self.grows, scaling))

    def grows(self, scaling: Scaling) -> bool:
        """Whether there is room for more workers than these by now."""
        if more := room_for_another(scaling):
            self.say(f"{self.name:<9} there is room for more than {world()[1]} workers")
        return more

    def finish(self, loop: Loop) -> None:
        """The last evaluation and the final checkpoint, which says that the stage has ended."""
        if not self.settings.total_steps:
            loop.write({"schedule/strength": loop.position.strength})
        losses = self.held_out.losses(loop.model)
        self.note(loop, losses)
        self.held_out.record(self.name, losses)
        self.save(loop, self.folder.final)

    def note(self, loop: Loop, losses: Mapping[str, float]) -> None:
        """Held-out losses into metrics and position."""
        position = loop.position
        found = {f"eval/{domain}_loss": loss for domain, loss in losses.items()}
        found["train/peak_memory_gb"] = max(all_gather_objects(peak_memory_gb(self.device)))
        loop.write({**found, "train/seconds": self.clock.training()})
        better = position.best is None or mean_loss(losses) < position.best
        if better and (loop.at_end or self.checkpoints.possible(loop)):
            position.best = mean_loss(losses)
            if not loop.at_end:
                self.save(loop, self.folder.best)

    @goodput.counted("checkpoint")
    def save(self, loop: Loop, directory: str) -> None:
        """Begin a checkpoint of the loop as it stands."""
        data: dict[str, Any] | None = None
        if self.settings.total_steps:
            data = on_rank_zero(partial(self.ask, "state", loop.data_step))
        held = state.as_json(loop.position, data) | {"stage": self.name, "time": time.time()}
        if self.influence is not None:
            held["influence"] = self.influence.state(loop)
        self.checkpoints.save(loop, directory, held, self.files)


def peak_memory_gb(device: torch.device) -> float:
    """The most that this worker took so far: of its GPU, or of the machine's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _shards(folder: str) -> Shards:
    manifest = read_manifest(folder)
    assert manifest is not None, f"{folder} was prepared by the driver"
    return Shards(folder, manifest)

"""The stream into Ray Train: planned tickets in order, exactly once, through kills and decisions.

Every batch that a worker receives is compared with what the in-process reader gives for the final
journal; the journal's decisions are taken by the workers themselves while they train.
"""

import hashlib
import itertools
import json
import os
import signal
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitray import storage
from bitray.data.manifest import Counts, Manifest, Shard, SourceManifest, write_manifest
from bitray.data.mixture import Mixture, StageMixture
from bitray.data.packing import Row
from bitray.data.plan import Entry, MixturePlan
from bitray.data.reader import PlanReader, SyntheticShards
from bitray.data.shards import ShardWriter, group_rows
from bitray.data.tickets import EMPTY, Deal
from bitray.models.batch import IGNORED, Batch

pytestmark = [pytest.mark.ray, pytest.mark.usefixtures("ray_cluster")]

SYNTHETIC = SyntheticShards({"a": 300, "b": 1000}, length=64, vocab_size=251)


def prepared(root: Path) -> Manifest:
    """A prepared folder that holds the synthetic rows."""
    sources = {}
    for source, count in SYNTHETIC.rows.items():
        ids, lengths, prompts = SYNTHETIC.read(source, "train", np.arange(count))
        writer = ShardWriter(SYNTHETIC.length)
        writer.add(Row(*row) for row in zip(ids, lengths, prompts, strict=True))
        name = f"{source}/train-000000.arrow"
        data = writer.close().to_pybytes()
        storage.write_bytes(str(root / name), data)
        digest = hashlib.sha256(data).hexdigest()
        shard = Shard(name=name, rows=count, size=len(data), sha256=digest)
        tokens = sum(map(sum, lengths))
        train = Counts(documents=sum(map(len, lengths)), tokens=tokens, rows=count, shards=(shard,))
        splits = {"train": train, "probe": Counts(), "validation": Counts()}
        sources[source] = SourceManifest(splits=splits)
    manifest = Manifest(
        job=hashlib.sha256(str(root).encode()).hexdigest(),
        length=SYNTHETIC.length,
        group_rows=group_rows(SYNTHETIC.length),
        window=4096,
        tokenizer="t",
        vocab_size=SYNTHETIC.vocab_size,
        eos_token_id=0,
        made_from={},
        sources=sources,
    )
    write_manifest(str(root), manifest)
    return manifest


def stage(manifest: Manifest, **changes: Any) -> StageMixture:
    values: dict[str, Any] = {
        "seed": 0,
        "manifest": manifest.identity(),
        "sizes": SYNTHETIC.sizes,
        "weights": {"a": 0.3, "b": 0.7},
        "length": SYNTHETIC.length,
        "steps": 60,
        "rows_per_ticket": 2,
        "tickets_per_step": 4,
        "bundle": 4,
        "max_workers": 2,
        "lead": 4,
    }
    return StageMixture(**{**values, **changes})


def digest(batch: Batch) -> str:
    tensors = (batch.input_ids, batch.labels, batch.position_ids, batch.source_id)
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in tensors)).hexdigest()


def newest_state(root: str, name: str) -> dict[str, Any] | None:
    path = Path(root, f"{name}.json")
    return json.loads(path.read_text()) if path.exists() else None


def train(arguments: dict[str, Any]) -> None:
    """A loop without a model: takes batches, decides, keeps checkpoints, dies when told to."""
    import ray
    import ray.train
    import torch.distributed as dist

    from bitray.data.stream import worker_batches

    rank = ray.train.get_context().get_world_rank()
    world_size = ray.train.get_context().get_world_size()
    actor = ray.get_actor(arguments["actor"])
    root = Path(arguments["root"])
    stages: dict[str, StageMixture] = arguments["stages"]
    streams: dict[str, Any] = {}

    def begin(name: str) -> None:
        state = newest_state(str(root), name)
        ticket = state["next_ticket"] if state else 0
        shard = ray.train.get_dataset_shard(name)
        streams[name] = worker_batches(shard, stages[name], rank, world_size, ticket)

    names = [n for n in stages if (newest_state(str(root), n) or {}).get("step") != stages[n].steps]
    for name in names:
        mixture = stages[name]
        if name not in streams:
            begin(name)
        following = names[names.index(name) + 1 :]
        state = newest_state(str(root), name)
        deal = Deal(mixture.tickets_per_step, world_size)
        waits = []
        for step in range(state["step"] if state else 0, mixture.steps):
            began = time.perf_counter()
            drawn = [next(streams[name]) for _ in range(deal.micro_batches)]
            waits.append(time.perf_counter() - began)
            assert [ticket for ticket, _ in drawn] == deal.step(rank, step)
            with (root / f"seen-{rank}.jsonl").open("a") as log:
                for ticket, batch in drawn:
                    assert bool((batch.labels == IGNORED).all()) == (ticket == EMPTY)
                    log.write(json.dumps([name, ticket, digest(batch)]) + "\n")
            time.sleep(arguments.get("sleep", 0.0))
            dist.barrier()
            done = step + 1
            if rank == 0 and mixture.period and done % mixture.period == 0:
                weights = {"a": 0.1 + 0.8 * (done % 3) / 3, "b": 0.5}
                ray.get(actor.set_weights.remote(name, done, weights))
            if rank == 0 and (done % 5 == 0 or done == mixture.steps):
                state = ray.get(actor.state.remote(name, done))
                storage.write_json(str(root / f"{name}.json"), state)
            if done == mixture.steps - 20 and following:
                begin(following[0])
            meddle(arguments, root, name, done, rank)
        with pytest.raises(StopIteration):
            next(streams[name])
        if rank == 0:
            storage.write_json(str(root / f"{name}-waits.json"), waits)


def meddle(arguments: dict[str, Any], root: Path, name: str, done: int, rank: int) -> None:
    """Kill this worker (once) or the actor, or set weights, where the test says."""
    import ray

    actor = ray.get_actor(arguments["actor"])
    if [name, done] == arguments.get("set_weights", [])[:2]:
        ray.get(actor.set_weights.remote(name, done, arguments["set_weights"][2]))
    if [name, done, rank] == arguments.get("kill_worker") and not (root / "killed").exists():
        (root / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if [name, done, rank] == arguments.get("kill_actor"):
        ray.kill(actor, no_restart=False)


def fit(root: Path, manifest: Manifest, stages: dict[str, StageMixture], **how: Any) -> None:
    from ray import cloudpickle
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from bitray.data.actor import mixture_actor
    from bitray.data.stream import TicketConfig, TicketStream, ticket_dataset

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    name = f"mixture-{root.name}"
    actor = mixture_actor(name, str(root / "mixture"))
    arguments = {"actor": name, "root": str(root), "stages": stages, **how}
    datasets = {
        key: ticket_dataset(
            TicketStream(key, mixture, str(root / "rows"), name),
            partial(newest_state, str(root), key),
        )
        for key, mixture in stages.items()
    }
    TorchTrainer(
        train,
        train_loop_config=arguments,
        scaling_config=ScalingConfig(
            num_workers=how.get("workers", 2), resources_per_worker={"CPU": 0.5}
        ),
        run_config=RunConfig(
            name=f"run-{how.get('workers', 2)}",
            storage_path=str(root),
            failure_config=FailureConfig(max_failures=how.get("max_failures", 3)),
        ),
        datasets=datasets,
        dataset_config=TicketConfig(),
    ).fit()
    del actor


def seen(root: Path, name: str) -> list[tuple[int, str]]:
    """Ticket and digest of all that the workers received, in no order; empty ones left out."""
    lines = [line for path in root.glob("seen-*.jsonl") for line in path.open()]
    entries = [tuple(entry[1:]) for entry in map(json.loads, lines) if entry[0] == name]
    return [(ticket, found) for ticket, found in entries if ticket != EMPTY]


def expected(root: Path, mixture: StageMixture, name: str) -> dict[int, str]:
    """Ticket -> digest, by the in-process reader, for the journal as it ended."""
    plan = MixturePlan(mixture.seed, mixture.sizes, journal(root, name))
    reader = PlanReader(
        plan,
        SYNTHETIC,
        mixture.rows_per_ticket,
        tickets_per_step=mixture.tickets_per_step,
    )
    tickets = mixture.steps * mixture.tickets_per_step
    return {t: digest(batch) for t, batch in itertools.islice(reader.batches(), tickets)}


def journal(root: Path, name: str) -> list[Entry]:
    """The decisions of a stage, as its last checkpoint holds them."""
    state = newest_state(str(root), name)
    assert state is not None
    return [Entry.from_json(entry) for entry in state["journal"]]


def check(root: Path, mixture: StageMixture, name: str) -> int:
    """Every ticket arrived, and what arrived is the plan; how many arrived more than once."""
    wanted = expected(root, mixture, name)
    received = seen(root, name)
    assert {ticket for ticket, _ in received} == set(wanted)
    assert all(wanted[ticket] == found for ticket, found in received)
    return len(received) - len(wanted)


def test_every_ticket_once_and_in_order_through_decisions_and_a_killed_worker(
    tmp_path: Path,
) -> None:
    """Two stages in one fit, the second with three tickets a step for two workers. A worker is
    killed after a decision that no checkpoint holds: it is dropped and taken again. A phase of the
    second stage begins between its decisions."""
    manifest = prepared(tmp_path / "rows")
    one = stage(manifest, steps=40, period=10)
    phases = ((25, {"b": 1.0}),)
    two = stage(
        manifest, steps=60, period=8, tickets_per_step=3, lead=6, after="one", phases=phases
    )
    fit(tmp_path, manifest, {"one": one, "two": two}, kill_worker=["two", 33, 1])
    assert (tmp_path / "killed").exists()
    assert check(tmp_path, one, "one") == 0
    # Steps 30 to 32 were lost with the worker; the other one may have begun step 33.
    assert 3 * 3 <= check(tmp_path, two, "two") <= 4 * 3
    decided = [-1, 8, 16, 25 - 6, *range(24, 60, 8)]  # a phase is known as if it were decided
    assert [entry.step for entry in journal(tmp_path, "two")] == decided
    ends = MixturePlan(0, one.sizes, journal(tmp_path, "one")).cursors(one.end)
    assert journal(tmp_path, "two")[0].cursors == ends


@pytest.mark.slow
def test_one_worker_without_gates_while_the_actor_is_lost(tmp_path: Path) -> None:
    """Nothing waits for a decision, one comes all the same, and the actor dies on the way."""
    manifest = prepared(tmp_path / "rows")
    mixture = stage(manifest, steps=300, bundle=2, rows_per_ticket=3)
    how = {"workers": 1, "kill_actor": ["one", 10, 0], "set_weights": ["one", 20, {"b": 1.0}]}
    fit(tmp_path, manifest, {"one": mixture}, **how)
    assert check(tmp_path, mixture, "one") == 0
    opening, decision = journal(tmp_path, "one")
    assert opening.first_row == 0 and decision.step == 20
    assert decision.first_row >= (20 + mixture.lead) * 12  # and after all that is handed out


# ------------------------------------------------------------------- another number of workers


class Group:
    """Workers without a trainer. The last one is a process, to be killed; a start takes seconds, so
    the others are threads of this one."""

    def __init__(self, stream: Any, state: dict[str, Any] | None, world_size: int) -> None:
        import ray

        from bitray.data.stream import TicketConfig, ticket_dataset, worker_batches

        opened = ticket_dataset(stream, lambda: state)()
        mixture = stream.mixture
        self.deal = Deal(mixture.tickets_per_step, world_size)
        self.step = opened.first_step
        ticket = self.step * mixture.tickets_per_step
        *shards, last = TicketConfig().configure({stream.name: opened}, world_size)
        worker: Any = ray.remote(Worker).options(num_cpus=0.1, max_restarts=0)
        rank = world_size - 1
        self.process = worker.remote(last[stream.name], mixture, rank, world_size, ticket)
        self.threads = [
            worker_batches(shard[stream.name], mixture, rank, world_size, ticket)
            for rank, shard in enumerate(shards)
        ]

    def train(self) -> dict[int, str]:
        """The global batch of a step: ticket -> digest."""
        import ray

        count = self.deal.micro_batches
        last = self.process.draw.remote(count)
        drawn = [draw(thread, count) for thread in self.threads] + [ray.get(last, timeout=120)]
        assert [[ticket for ticket, _ in each] for each in drawn] == [
            self.deal.step(rank, self.step) for rank in range(self.deal.world_size)
        ]
        self.step += 1
        return {ticket: found for each in drawn for ticket, found in each if ticket != EMPTY}

    def kill(self) -> None:
        """SIGKILL one worker; the others end with it."""
        import ray

        os.kill(ray.get(self.process.pid.remote()), signal.SIGKILL)
        for thread in self.threads:
            thread.close()


class Worker:
    """A worker as a process."""

    def __init__(self, shard: Any, mixture: StageMixture, *place: int) -> None:
        from bitray.data.stream import worker_batches

        self.batches = worker_batches(shard, mixture, *place)

    def pid(self) -> int:
        return os.getpid()

    def draw(self, count: int) -> list[tuple[int, str]]:
        return draw(self.batches, count)


def draw(batches: Any, count: int) -> list[tuple[int, str]]:
    return [(ticket, digest(batch)) for ticket, batch in itertools.islice(batches, count)]


def decision(step: int) -> dict[str, float] | None:
    """What is decided at a step, whoever trains."""
    return None if step % 3 == 0 else {"a": 0.1 + 0.8 * (step % 5) / 5, "b": 0.5}


@pytest.mark.slow
def test_one_two_three_and_four_workers_take_turns_and_are_killed_in_between(
    tmp_path: Path,
) -> None:
    """Every twelve steps a checkpoint; three steps later a kill, and one worker more goes on from
    the checkpoint. Decisions are taken every four steps, lost ones again."""
    import ray
    from ray import cloudpickle

    from bitray.data.actor import mixture_actor
    from bitray.data.stream import TicketStream

    cloudpickle.register_pickle_by_value(sys.modules[__name__])
    manifest = prepared(tmp_path / "rows")
    mixture = stage(
        manifest, steps=48, period=4, tickets_per_step=3, bundle=2, max_workers=4, lead=6
    )
    name = f"mixture-{tmp_path.name}"
    actor = mixture_actor(name, str(tmp_path / "mixture"))
    stream = TicketStream("one", mixture, str(tmp_path / "rows"), name)
    state, trained, again = None, {}, 0
    for world_size in (1, 2, 3, 4):
        group = Group(stream, state, world_size)
        lost: dict[int, str] = {}
        for step in range(group.step, min(group.step + 15, mixture.steps)):
            batch = group.train()
            assert sorted(batch) == list(range(3 * step, 3 * step + 3))
            if (done := step + 1) % 4 == 0:
                ray.get(actor.set_weights.remote("one", done, decision(done)))
            if done <= 12 * world_size:
                assert not trained.keys() & batch.keys(), "a ticket twice in one lineage"
                trained |= batch
            else:
                lost |= batch
            if done == 12 * world_size:
                state = ray.get(actor.state.remote("one", done))
                storage.write_json(str(tmp_path / "one.json"), state)
        again += len(lost)
        group.kill()
        del group
    assert again == 3 * 3 * 3
    alone = Mixture.opened(mixture, 1, None)
    for step in range(4, 49, 4):
        alone.decide(step, decision(step))
    assert journal(tmp_path, "one") == list(alone.plan.journal)
    assert trained == expected(tmp_path, mixture, "one")

"""The stream into Ray Train: planned tickets in order, exactly once, through kills and decisions.

Every batch that a worker receives is compared with what the in-process reader gives for the final
journal; the journal's decisions are taken by the workers themselves while they train.
"""

import hashlib
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
from bitray.data.mixture import StageMixture
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
        ids, lengths = SYNTHETIC.read(source, "train", np.arange(count))
        writer = ShardWriter(SYNTHETIC.length)
        writer.add(Row(*row) for row in zip(ids, lengths, strict=True))
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
                    empty = bool((batch.labels == IGNORED).all())
                    seen = [name, step, ticket, EMPTY if empty else digest(batch)]
                    log.write(json.dumps(seen) + "\n")
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
            die(arguments, root, name, done, rank)
        with pytest.raises(StopIteration):
            next(streams[name])
        if rank == 0:
            storage.write_json(str(root / f"{name}-waits.json"), waits)


def die(arguments: dict[str, Any], root: Path, name: str, done: int, rank: int) -> None:
    """Kill this worker, or the actor, once, where the test says."""
    import ray

    if [name, done, rank] == arguments.get("kill_worker") and not (root / "killed").exists():
        (root / "killed").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if [name, done, rank] == arguments.get("kill_actor"):
        ray.kill(ray.get_actor(arguments["actor"]), no_restart=False)


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
            name="run", storage_path=str(root), failure_config=FailureConfig(max_failures=1)
        ),
        datasets=datasets,
        dataset_config=TicketConfig(),
    ).fit()
    del actor


def seen(root: Path, name: str) -> list[tuple[int, int, str]]:
    """(step, ticket, digest) of all that the workers received, in no order."""
    lines = [line for path in root.glob("seen-*.jsonl") for line in path.open()]
    return [tuple(entry[1:]) for entry in map(json.loads, lines) if entry[0] == name]


def expected(root: Path, mixture: StageMixture, name: str) -> dict[int, str]:
    """Ticket -> digest, by the in-process reader, for the journal as it ended."""
    state = newest_state(str(root), name)
    assert state is not None and state["step"] == mixture.steps
    journal = [Entry.from_json(entry) for entry in state["journal"]]
    reader = PlanReader(
        MixturePlan(mixture.seed, mixture.sizes, journal),
        SYNTHETIC,
        mixture.rows_per_ticket,
        tickets_per_step=mixture.tickets_per_step,
    )
    batches = reader.batches()
    tickets = mixture.steps * mixture.tickets_per_step
    return {ticket: digest(batch) for ticket, batch in (next(batches) for _ in range(tickets))}


def test_every_ticket_once_and_in_order_through_decisions_and_a_killed_worker(
    tmp_path: Path,
) -> None:
    """Two stages in one fit, weights decided every 10 steps, a worker killed in the second stage
    after a decision that is not in a checkpoint: it is dropped and taken again."""
    manifest = prepared(tmp_path / "rows")
    stages = {
        "one": stage(manifest, steps=40, period=10),
        "two": stage(manifest, steps=60, period=8, after="one"),
    }
    fit(tmp_path, manifest, stages, kill_worker=["two", 33, 1])
    assert (tmp_path / "killed").exists()
    for name, mixture in stages.items():
        wanted = expected(tmp_path, mixture, name)
        received = seen(tmp_path, name)
        assert {ticket for _, ticket, _ in received} == set(range(mixture.steps * 4))
        # What was received again after the kill is what was received before it.
        assert all(wanted[ticket] == found for _, ticket, found in received)
        twice = len(received) - len(wanted)
        lost = 0 if name == "one" else 3 * 4  # steps 30 to 32; the other rank may have begun 33
        assert lost <= twice <= lost + 2
    state = newest_state(str(tmp_path), "two")
    assert state is not None and len(state["journal"]) == 1 + 60 // 8
    assert state["generation"] == 2
    opening = newest_state(str(tmp_path), "two")["journal"][0]
    plan = MixturePlan(
        0,
        SYNTHETIC.sizes,
        [Entry.from_json(e) for e in newest_state(str(tmp_path), "one")["journal"]],
    )
    assert tuple(opening["cursors"]) == plan.cursors(40 * 8)
    waits = [np.array(json.loads((tmp_path / f"{n}-waits.json").read_text())) for n in stages]
    print(
        "ms of waiting a step:",
        [(w.mean() * 1e3, np.median(w) * 1e3, w.max() * 1e3) for w in waits],
    )

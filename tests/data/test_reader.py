"""Reading by the plan without Ray: the same rows for any number of workers and any micro-batch."""

import json
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from bitray.data.mixture import Mixture, StageMixture
from bitray.data.plan import MixturePlan, opening
from bitray.data.reader import PlanReader, SyntheticShards, empty_batch, read_rows
from bitray.data.tickets import EMPTY
from bitray.models.batch import IGNORED

ROWS = {"a": 30, "b": 200, "c": 50}
SHARDS = SyntheticShards(ROWS, length=32, vocab_size=97)
PLAN = MixturePlan(0, SHARDS.sizes, [opening(SHARDS.sizes, {"a": 0.2, "b": 0.5, "c": 0.3})])


def readers(
    world_size: int, rows_per_ticket: int = 2, tickets_per_step: int = 6
) -> list[PlanReader]:
    return [
        PlanReader(
            PLAN,
            SHARDS,
            rows_per_ticket,
            rank=rank,
            world_size=world_size,
            tickets_per_step=tickets_per_step,
        )
        for rank in range(world_size)
    ]


def steps(world_size: int, count: int, start_ticket: int = 0, **shape: int) -> list[torch.Tensor]:
    """The global batches of some steps, rows in order of the plan."""
    group = readers(world_size, **shape)
    streams = [reader.batches(start_ticket) for reader in group]
    found = []
    for _ in range(count):
        drawn = [
            next(stream)
            for reader, stream in zip(group, streams, strict=True)
            for _ in range(reader.deal.micro_batches)
        ]
        real = sorted((t, b) for t, b in drawn if t != EMPTY)
        found.append(torch.cat([batch.input_ids for _, batch in real]))
    return found


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 7])
def test_global_batches_do_not_depend_on_the_number_of_workers(world_size: int) -> None:
    for one, many in zip(steps(1, 4), steps(world_size, 4), strict=True):
        assert torch.equal(one, many)


def test_nor_on_the_micro_batch() -> None:
    shape = {"rows_per_ticket": 3, "tickets_per_step": 4}
    for one, other in zip(steps(1, 4), steps(2, 4, **shape), strict=True):
        assert torch.equal(one, other)


def test_reading_begins_at_any_step() -> None:
    assert torch.equal(steps(2, 5)[4], steps(3, 1, start_ticket=4 * 6)[0])


def test_a_ticket_in_mid_step_is_our_mistake() -> None:
    with pytest.raises(AssertionError, match="does not begin a step"):
        next(readers(1)[0].batches(3))


def test_batches_are_the_rows_of_the_plan() -> None:
    _, batch = next(readers(1)[0].batches(6))
    rows = PLAN.rows(12, 2)
    assert batch.source_id.tolist() == rows.source.tolist()
    for at in range(2):
        found = SHARDS.read("abc"[rows.source[at]], "train", rows.row[at : at + 1])
        expected = found.batch()
        assert torch.equal(batch.input_ids[at], expected.input_ids[0])
        assert torch.equal(batch.position_ids[at], expected.position_ids[0])
        assert torch.equal(batch.labels[at], expected.labels[0])


def test_workers_without_a_ticket_get_nothing_to_learn() -> None:
    found = dict.fromkeys(range(7), 0)
    for rank, reader in enumerate(readers(7)):
        ticket, batch = next(reader.batches())
        assert batch.input_ids.shape == (2, 32)
        if ticket == EMPTY:
            found[rank] += 1
            assert (batch.labels == IGNORED).all() and not batch.real.any()
    assert sum(found.values()) == 1


def test_reading_ends_where_the_sources_do() -> None:
    plan = MixturePlan(0, SHARDS.sizes, [opening(SHARDS.sizes, {"a": 1.0})], max_epochs=1)
    reader = PlanReader(plan, SHARDS, 4, tickets_per_step=2)
    assert [ticket for ticket, _ in reader.batches()] == list(range(6))  # 30 rows, 8 a step


def test_rows_come_back_in_the_order_of_the_plan() -> None:
    rows = PLAN.rows(100, 40)
    ids, lengths, prompts = read_rows(SHARDS, PLAN.sources, rows)
    for at in range(40):
        alone = SHARDS.read("abc"[rows.source[at]], "train", rows.row[at : at + 1])
        assert (ids[at] == alone.input_ids[0]).all()
        assert (lengths[at], prompts[at]) == (alone.lengths[0], alone.prompts[0])


def test_synthetic_rows_can_be_told_apart_and_learnt() -> None:
    ids, lengths, _ = SHARDS.read("c", "train", np.arange(50))
    assert len(np.unique(ids, axis=0)) == 50
    for row, documents in zip(ids, lengths, strict=True):
        start = 0
        for count in documents:
            assert count >= 4
            assert (np.diff(row[start : start + count].astype(int)) % 97 == 3).all()
            start += count
        assert (row[start:] == 0).all()


def test_an_empty_batch_has_no_token() -> None:
    batch = empty_batch(2, 8)
    assert (batch.labels == IGNORED).all() and not batch.real.any()
    assert batch.position_ids.tolist() == [list(range(8))] * 2


class Counting:
    """Rows that are counted as they are read."""

    def __init__(self) -> None:
        self.rows = 0

    def read(self, source: str, split: str, rows: Any) -> Any:
        self.rows += len(rows)
        return SHARDS.read(source, split, rows)


def calls(work: Callable[[], Any]) -> int:
    """Functions called, in Python and in C: work that no clock blurs."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    sys.setprofile(note)
    try:
        work()
    finally:
        sys.setprofile(None)
    return count


@pytest.mark.parametrize("max_epochs", [None, 10**9])
def test_resuming_costs_the_same_at_step_ten_and_at_a_million(max_epochs: int | None) -> None:
    """From a checkpoint's state to the first batch: as much work, and no row read but its own."""
    stage = StageMixture(
        seed=0, manifest="m", sizes=SHARDS.sizes, weights={"a": 0.2, "b": 0.5, "c": 0.3},
        length=32, steps=2_000_000, rows_per_ticket=2, tickets_per_step=6, bundle=4,
        max_epochs=max_epochs,
    )  # fmt: skip

    def resumed(step: int) -> int:
        before, shards = Mixture.opened(stage, 1, None), Counting()
        for number in range(4):
            before.decide(step - 8 + 2 * number, {"a": 1.0, "b": 1.0 + number, "c": 1.0})
        state = json.loads(json.dumps(before.state(step)))

        def work() -> None:
            plan = Mixture.opened(stage, 2, state).plan
            reader = PlanReader(plan, shards, 2, tickets_per_step=6)
            assert next(reader.batches(step * 6))[0] == step * 6

        found = calls(work)
        assert shards.rows == 2
        return found

    resumed(500_000)  # tables of each weighting, at most a line for each of 1024 blocks, are kept
    near, far = resumed(10), resumed(1_000_000)
    assert far < 1.2 * near, (near, far)

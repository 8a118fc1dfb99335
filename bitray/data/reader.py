"""Reading rows by the plan in this process: tests, evaluation, torchrun, machines without Ray."""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from bitray.data.manifest import SplitName
from bitray.data.packing import PackedRows
from bitray.data.permutation import mix
from bitray.data.plan import MixturePlan, Rows, SourceSize
from bitray.data.tickets import EMPTY, Deal

if TYPE_CHECKING:
    from bitray.models.batch import Batch

AHEAD = 1024
"""Rows that a reader plans at once, in whole steps: what a plan costs is by call."""


@runtime_checkable
class RowReader(Protocol):
    """What rows are read from: `Shards`, or `SyntheticShards`."""

    def read(self, source: str, split: SplitName, rows: Int[np.ndarray, " n"]) -> PackedRows:
        """These rows, in this order."""
        ...


def read_rows(shards: RowReader, sources: Sequence[str], rows: Rows) -> PackedRows:
    """The training rows of a plan, in its order, read source by source."""
    parts, order = [], []
    for number in np.unique(rows.source):
        places = np.flatnonzero(rows.source == number)
        parts.append(shards.read(sources[number], "train", rows.row[places]))
        order.append(places)
    ids, lengths, prompts = zip(*parts, strict=True)
    back = np.argsort(np.concatenate(order))
    documents = [*itertools.chain(*lengths)], [*itertools.chain(*prompts)]
    return PackedRows(np.concatenate(ids)[back], *([found[k] for k in back] for found in documents))


def empty_batch(rows: int, length: int) -> "Batch":
    """A micro-batch without any token, for a worker that has no ticket left in a step."""
    nothing: list[list[int]] = [[] for _ in range(rows)]
    return PackedRows(np.zeros((rows, length), np.int32), nothing, nothing).batch()


class PlanReader:
    """One worker's micro-batches in the order of a plan."""

    def __init__(
        self,
        plan: MixturePlan,
        shards: RowReader,
        rows_per_ticket: int,
        *,
        rank: int = 0,
        world_size: int = 1,
        tickets_per_step: int = 1,
    ) -> None:
        self.plan = plan
        self.shards = shards
        self.rows_per_ticket = rows_per_ticket
        self.rank = rank
        self.deal = Deal(tickets_per_step, world_size)

    def batches(self, start_ticket: int = 0) -> Iterator[tuple[int, "Batch"]]:
        """`(ticket, batch)` from a ticket that begins a step on, to the end of the plan if it has
        one; per step as many as `Deal.micro_batches`, empty ones with ticket -1 included."""
        step, rest = divmod(start_ticket, self.deal.tickets_per_step)
        assert rest == 0, f"ticket {start_ticket} does not begin a step"
        rows_per_step = self.rows_per_ticket * self.deal.tickets_per_step
        while self.plan.end is None or (step + 1) * rows_per_step <= self.plan.end:
            last = step + max(1, AHEAD // rows_per_step)
            if self.plan.end is not None:
                last = min(last, self.plan.end // rows_per_step)
            dealt = [self.deal.step(self.rank, each) for each in range(step, last)]
            yield from self._planned([ticket for tickets in dealt for ticket in tickets])
            step = last

    def _planned(self, tickets: list[int]) -> Iterator[tuple[int, "Batch"]]:
        size = self.rows_per_ticket
        firsts = [ticket * size for ticket in tickets if ticket != EMPTY]
        rows = iter(self.plan.pick(firsts, size).cut(size) if firsts else ())
        for ticket in tickets:
            if ticket == EMPTY:
                yield ticket, empty_batch(size, self._length)
            else:
                yield ticket, self._batch(next(rows))

    def _batch(self, rows: Rows) -> "Batch":
        return read_rows(self.shards, self.plan.sources, rows).batch(rows.source.tolist())

    @cached_property
    def _length(self) -> int:
        first = read_rows(self.shards, self.plan.sources, self.plan.rows(0, 1))
        return first.input_ids.shape[1]


class SyntheticShards:
    """Rows out of nothing, for tests: documents of random length that count in steps.

    Token i of a document is `start + i * stride` modulo the vocabulary, the stride belonging to the
    source, so a model can learn them and a test can tell sources, rows and documents apart.
    """

    def __init__(self, sizes: dict[str, int], length: int, vocab_size: int, seed: int = 0) -> None:
        self.rows = dict(sizes)
        self.length = length
        self.vocab_size = vocab_size
        self.seed = seed

    @property
    def sizes(self) -> dict[str, SourceSize]:
        """Rows and real tokens of every source, as the plan wants them."""
        found = {}
        for source, count in self.rows.items():
            lengths = self.read(source, "train", np.arange(count)).lengths
            found[source] = SourceSize(count, sum(map(sum, lengths)))
        return found

    def read(
        self, source: str, split: SplitName, rows: Int[np.ndarray, " n"] | Sequence[int]
    ) -> PackedRows:
        """The rows with these numbers, padded with 0; every second source has prompts."""
        ids = np.zeros((len(rows), self.length), np.int32)
        lengths = []
        for k, row in enumerate(rows):
            assert 0 <= row < self.rows[source], (source, row)
            lengths.append(self._fill(ids[k], list(self.rows).index(source), split, int(row)))
        share = list(self.rows).index(source) % 2
        return PackedRows(ids, lengths, [[share * n // 4 for n in found] for found in lengths])

    def _fill(self, ids: np.ndarray, number: int, split: str, row: int) -> list[int]:
        """Write documents into a row; returns their lengths, which may leave padding."""
        noise = mix(self.seed, number, len(split), row, np.arange(16)).astype(np.int64) >> 1
        at, lengths = 0, []
        for start in noise:
            count = min(4 + int(start) % (self.length // 2), self.length - at)
            if count < 4:
                break
            steps = start + np.arange(count) * (number + 1)
            ids[at : at + count] = steps % self.vocab_size
            lengths.append(count)
            at += count
        return lengths

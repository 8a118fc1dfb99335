"""The mixture plan: which row of which source stands at each place of the training order.

A pure function of (seed, source sizes, journal), constant time at any place, independent of the
number of workers and of the micro-batch. The journal is the list of weightings and where each
begins. Nothing here reads data, waits, or knows of Ray.
"""

import bisect
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int64

from bitray.data.permutation import WINDOW, key_of, mix, place
from bitray.data.weights import UNIT, apportion, project_to_bounds, quantise
from bitray.settings import UserError

__all__ = ["Entry", "MixturePlan", "Rows", "SourceSize", "opening", "project_to_bounds"]

BLOCK = 1024
"""Rows of a quota block."""
PERIOD = 1024
"""Blocks after which the quotas repeat, because row shares are multiples of 1 / WHOLE."""
WHOLE = BLOCK * PERIOD
_NONE = Fraction(0)
_ENDLESS = 1 << 62

MaxEpochs = int | Mapping[str, int] | None
"""Times that a source may be gone through: all sources, some by name, or no limit."""


class SourceSize(NamedTuple):
    """What the plan has to know of a source."""

    rows: int
    """That are there: all of them, or whole windows of a source that is still being prepared."""
    tokens: int
    """Real tokens in its first `sample` rows; weights are shares of tokens."""
    sample: int | None = None
    """None: all. Else the rows of its opening, so that the ratio does not depend on how far
    preparing has come."""
    done: bool = True
    """Whether that is all; else where it ends is not known, and no plan depends on it."""
    window: int = WINDOW
    """Rows that are permuted among themselves."""


class Rows(NamedTuple):
    """Some consecutive places of the order."""

    source: Int64[np.ndarray, " n"]
    epoch: Int64[np.ndarray, " n"]
    row: Int64[np.ndarray, " n"]
    """Number within the source."""

    def cut(self, size: int) -> "list[Rows]":
        """The same in pieces of so many rows."""
        starts = range(0, len(self.row), size)
        return [Rows(*(part[at : at + size] for part in self)) for at in starts]


@dataclass(frozen=True)
class Entry:
    """One line of the journal: what holds from a row on, and enough state to go on from there."""

    version: int
    """Number of the weighting; a decision to change nothing keeps it."""
    step: int
    """Optimizer step at whose end it was decided; -1 for the opening."""
    first_row: int
    weights: tuple[int, ...]
    """Token shares in multiples of 1 / UNIT, in the order of the sources."""
    cursors: tuple[int, ...]
    """Rows that each source has given before `first_row`, in earlier stages too."""
    remainders: tuple[int, ...]
    """Rows, in multiples of 1 / WHOLE, that each source is owed at `first_row`."""
    notes: dict[str, Any] = field(default_factory=dict, compare=False)
    """Scores and the like, for people and for whoever decided."""
    epoch: int = field(default=0, compare=False)
    """Of the lease under which it was recorded."""

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Entry":
        """The entry that `to_json` wrote."""
        lists = {name: tuple(values[name]) for name in ("weights", "cursors", "remainders")}
        return cls(**{**values, **lists})


def opening(
    sizes: Mapping[str, SourceSize],
    weights: Mapping[str, float],
    cursors: Mapping[str, int] | None = None,
) -> Entry:
    """The first entry of a stage's journal; cursors continue from the stage before."""
    before = cursors or {}
    shares = quantise(weights, tuple(sizes))
    starts = tuple(before.get(name, 0) for name in sizes)
    return Entry(0, -1, 0, shares, starts, (0,) * len(sizes))


class MixturePlan:
    """Places -> rows of sources. `max_epochs` None repeats sources for ever; 1 stops at their end,
    and so for each source that is named where it is a mapping.

    An exhausted source leaves its weight to the others. `end` is the number of places in all, or
    None if there is no end.
    """

    def __init__(
        self,
        seed: int,
        sizes: Mapping[str, SourceSize],
        journal: Sequence[Entry],
        max_epochs: MaxEpochs = None,
    ) -> None:
        assert journal and journal[0].first_row == 0, "a journal begins with its opening"
        self.seed = seed
        self.sizes = dict(sizes)
        self.sources = tuple(sizes)
        self.journal = tuple(journal)
        self.max_epochs = max_epochs
        self._rows = np.array([size.rows for size in sizes.values()], np.int64)
        self._windows = np.array([size.window for size in sizes.values()], np.int64)
        self._keys = np.array([key_of(seed, name) for name in sizes], np.int64)
        self._caps = np.array([self._cap(name) for name in sizes], np.int64)
        self._segments, self.end = self._lay_out()
        self._starts = [segment.first_row for segment in self._segments]

    def __reduce__(self) -> tuple[Any, ...]:
        return MixturePlan, (self.seed, self.sizes, self.journal, self.max_epochs)

    def rows(self, first: int, count: int) -> Rows:
        """The rows at places `first .. first + count - 1`; `IndexError` past the end."""
        return self.pick([first], count)

    def pick(self, firsts: Sequence[int], count: int) -> Rows:
        """The rows at `count` places from each of `firsts` on, one after the other."""
        pieces = [piece for first in firsts for piece in self._pieces(first, count)]
        nothing = np.empty(0, np.int64)
        source = np.concatenate([nothing, *(sources for sources, _ in pieces)])
        cursor = np.concatenate([nothing, *(cursors for _, cursors in pieces)])
        of = self._rows[source], self._keys[source], self._windows[source]
        return Rows(source, *place(cursor, *of))

    def cursors(self, row: int) -> tuple[int, ...]:
        """How many rows each source has given before this place."""
        segment, _ = self._at(row)
        return tuple(segment.cursors(row - segment.first_row).tolist())

    def weights(self, row: int) -> dict[str, float]:
        """Token shares that were decided for this place, summing to 1."""
        at = bisect.bisect_right(self.journal, row, key=lambda entry: entry.first_row) - 1
        shares = zip(self.sources, self.journal[at].weights, strict=True)
        return {name: weight / UNIT for name, weight in shares}

    def covers(self, row: int) -> bool:
        """Whether all rows before this place are there to be read."""
        pairs = zip(self.sizes.values(), self.cursors(row), strict=True)
        return all(size.done or given <= size.rows for size, given in pairs)

    def decide(
        self,
        step: int,
        first_row: int,
        weights: Mapping[str, float] | None,
        notes: Mapping[str, Any] | None = None,
        bounds: tuple[float, float] = (0.0, 1.0),
    ) -> Entry:
        """The entry for a decision that takes effect at `first_row`; None changes nothing."""
        last = self.journal[-1]
        assert first_row >= last.first_row, "decisions come in order"
        cursors, remainders = last.cursors, last.remainders
        if first_row > last.first_row:  # else nothing was drawn since, and nothing is forgiven
            segment, _ = self._at(first_row)
            offset = first_row - segment.first_row
            cursors = tuple(segment.cursors(offset).tolist())
            remainders = tuple(segment.remainders(offset).tolist())
        shares = last.weights
        if weights is not None:
            shares = quantise(weights, self.sources, *bounds)
        return Entry(
            version=last.version + (weights is not None),
            step=step,
            first_row=first_row,
            weights=shares,
            cursors=cursors,
            remainders=remainders,
            notes=dict(notes or {}),
        )

    def extended(self, entry: Entry) -> "MixturePlan":
        """The plan with one more decision."""
        return MixturePlan(self.seed, self.sizes, (*self.journal, entry), self.max_epochs)

    # ------------------------------------------------------------------------------- segments

    def _pieces(self, first: int, count: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Sources and cursors of consecutive places, block by block."""
        if self.end is not None and first + count > self.end:
            raise IndexError(f"place {first + count - 1}: the sources end after {self.end} rows")
        while count:
            segment, room = self._at(first)
            offset = first - segment.first_row
            taken = min(count, room, BLOCK - offset % BLOCK)
            yield segment.draw(offset, taken)
            first, count = first + taken, count - taken

    def _at(self, row: int) -> tuple["_Segment", int]:
        """The segment that holds a place, and how many places are left in it from there."""
        index = bisect.bisect_right(self._starts, row) - 1
        last = index + 1 == len(self._starts)
        return self._segments[index], (1 << 62) if last else self._starts[index + 1] - row

    def _lay_out(self) -> tuple[list["_Segment"], int | None]:
        """Segments of constant shares: they begin at new weightings and where a source runs out."""
        versions = [None, *(entry.version for entry in self.journal)]
        pairs = zip(self.journal, versions, strict=False)
        changes = [entry for entry, before in pairs if entry.version != before]
        limits = [entry.first_row for entry in changes[1:]]
        segments: list[_Segment] = []
        for entry, limit in zip(changes, [*limits, None], strict=True):
            start: Entry | None = entry
            while start is not None:
                shares = self._shares(start)
                if not any(shares):
                    return segments, start.first_row
                segments.append(_Segment(self.seed, start, shares))
                start = self._exhaustion(segments[-1], start, limit)
        return segments, None

    def _cap(self, name: str) -> int:
        """Rows that a source can ever give, as far as that is known."""
        limits, size = self.max_epochs, self.sizes[name]
        most = limits.get(name) if isinstance(limits, Mapping) else limits
        return size.rows * most if most and size.done else _ENDLESS

    def _shares(self, entry: Entry) -> tuple[int, ...]:
        """Row shares in multiples of 1 / WHOLE, from token shares, without exhausted sources."""
        open_ = np.array(entry.cursors, np.int64) < self._caps
        demand = []
        for weight, (name, size), left in zip(
            entry.weights, self.sizes.items(), open_, strict=True
        ):
            if weight and not size.tokens:
                raise UserError(f"weights.{name}: this source has no rows; give it weight 0")
            rows = size.rows if size.sample is None else size.sample
            demand.append(Fraction(weight * rows, size.tokens) if left and weight else _NONE)
        return apportion(demand, WHOLE) if any(demand) else (0,) * len(demand)

    def _exhaustion(self, segment: "_Segment", start: Entry, limit: int | None) -> Entry | None:
        """The place before `limit` at which a source of this segment first has no row left."""
        if (self._caps[segment.used] == _ENDLESS).all():
            return None
        offset = segment.first_lack(self._caps - np.array(start.cursors, np.int64))
        row = segment.first_row + offset
        if limit is not None and row >= limit:
            return None
        given = segment.cursors(offset).tolist()
        owed = segment.remainders(offset).tolist()
        return Entry(start.version, start.step, row, start.weights, tuple(given), tuple(owed))


class _Segment:
    """Consecutive places under one set of row shares, in quota blocks that begin with it."""

    def __init__(self, seed: int, start: Entry, shares: tuple[int, ...]) -> None:
        self.first_row = start.first_row
        self._key = key_of(seed, start.version)
        self._given = np.array(start.cursors, np.int64)
        self._shares = np.array(shares, np.int64)
        self.used = np.flatnonzero(self._shares)
        self._owed = np.where(self._shares > 0, np.array(start.remainders, np.int64), 0)
        self._settling = self._settle() if self._owed.any() else None
        self._quotas = _quotas(shares)
        self._block = lru_cache(maxsize=8)(self._shuffled)

    def draw(
        self, offset: int, count: int
    ) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
        """Source and cursor of `count` places of one block."""
        block, within = divmod(offset, BLOCK)
        assert within + count <= BLOCK
        source, cursor = self._block(block)
        return source[within : within + count], cursor[within : within + count]

    def cursors(self, offset: int) -> Int64[np.ndarray, " k"]:
        """Rows that every source has given before this offset."""
        block, within = divmod(offset, BLOCK)
        source, _ = self._block(block)
        partly = np.bincount(source[:within], minlength=len(self._shares))
        return self._given + self._whole_blocks(block) + partly

    def remainders(self, offset: int) -> Int64[np.ndarray, " k"]:
        """Rows owed to every source at this offset, in multiples of 1 / WHOLE."""
        given = self.cursors(offset) - self._given
        return offset * self._shares + self._owed - given * WHOLE

    def first_lack(self, room: Int64[np.ndarray, " k"]) -> int:
        """The first offset whose source has given all the rows that it has room for."""
        used = self.used
        # Within 2 rows of the share at every block, so this block is past some source's end.
        slack = 3 + int(np.abs(self._owed).max()) // WHOLE
        most = min(int(room[k] + slack) * PERIOD // int(self._shares[k]) for k in used) + 2
        block = bisect.bisect_left(
            range(most), True, key=lambda b: bool((self._whole_blocks(b + 1) > room)[used].any())
        )
        source, cursor = self._block(block)
        return block * BLOCK + int(np.flatnonzero(cursor - self._given[source] >= room[source])[0])

    def _whole_blocks(self, blocks: int) -> Int64[np.ndarray, " k"]:
        """Rows given by the first so many blocks."""
        if self._settling is None or blocks == 0:
            return self._quotas.until(blocks)
        return self._settling + self._quotas.until(blocks - 1)

    def _settle(self) -> Int64[np.ndarray, " k"]:
        """The first block after a change also pays what the cut-off block before it left owing."""
        due = np.maximum(0, self._shares * BLOCK + self._owed)
        return np.array(apportion([Fraction(int(d)) for d in due], BLOCK), np.int64)

    def _shuffled(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Source and cursor at every place of one block."""
        before = self._whole_blocks(block)
        quota = self._whole_blocks(block + 1) - before
        row = self.first_row + block * BLOCK
        order = np.argsort(mix(self._key, row, np.arange(BLOCK)), kind="stable")
        source, cursor = np.empty(BLOCK, np.int64), np.empty(BLOCK, np.int64)
        ends = np.cumsum(quota)
        for k, count in enumerate(quota):
            spots = np.sort(order[ends[k] - count : ends[k]])
            source[spots] = k
            cursor[spots] = self._given[k] + before[k] + np.arange(count)
        return source, cursor


class _Quotas:
    """How many rows each source has given after n blocks: never a row away from its exact share.

    The whole part of what is due is given; the rows left over go to the sources whose next row
    falls due first. As in the assignment of seats by quotas, carried over from block to block, this
    never gives a source less than nothing and never misses by a row (earliest deadline first is
    optimal for unit jobs); largest remainders alone can do both when a share is below one row.
    """

    def __init__(self, shares: tuple[int, ...]) -> None:
        self._shares = np.array(shares, np.int64)
        self._known = [np.zeros(len(shares), np.int64)]

    def until(self, blocks: int) -> Int64[np.ndarray, " k"]:
        """Rows given by the first so many blocks."""
        periods, rest = divmod(blocks, PERIOD)
        while len(self._known) <= rest:
            self._known.append(self._next(self._known[-1], len(self._known)))
        return periods * self._shares + self._known[rest]

    def _next(self, given: np.ndarray, blocks: int) -> np.ndarray:
        exact = blocks * self._shares
        total = np.maximum(given, exact // PERIOD)
        left = blocks * BLOCK - int(total.sum())
        open_ = np.flatnonzero(total < -(-exact // PERIOD))
        assert 0 <= left <= len(open_), "quotas that no assignment meets"
        due = -(-(total[open_] + 1) * PERIOD // self._shares[open_])
        total[open_[np.argsort(due, kind="stable")[:left]]] += 1
        return total


_quotas = lru_cache(maxsize=64)(_Quotas)

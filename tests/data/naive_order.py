"""The order of rows by walking it, row after row, in exact fractions, to hold plans against.

Written from the rules alone (DATA: quotas of whole rows a block, carried over; a block begins with
every new weighting and where a source runs out), with nothing evaluated pointwise and no NumPy.
"""

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

BLOCK = 1024
WHOLE = 1024 * 1024
"""Row shares are multiples of 1 / WHOLE, weights of 1 / UNIT."""
UNIT = 4096
_MASK = (1 << 64) - 1


class Weighting(NamedTuple):
    """What holds from a row on."""

    first_row: int
    weights: tuple[int, ...]
    """In multiples of 1 / UNIT."""


Draw = tuple[int, ...]
"""Number of the source, and how many rows it has given before."""


class Order:
    """The order of a stage, walked as far as anybody has asked."""

    def __init__(
        self,
        seed: int,
        sizes: Mapping[str, tuple[int, ...]],
        weightings: Sequence[Weighting],
        cursors: Sequence[int],
        max_epochs: int | None,
    ) -> None:
        self.start = tuple(cursors)
        self.draws: list[Draw] = []
        self._walk = _walk(seed, list(sizes.values()), list(weightings), cursors, max_epochs)

    def until(self, row: int) -> list[Draw]:
        """The draws of all places before a row; fewer if the sources end before it."""
        while len(self.draws) < row:
            found = next(self._walk, None)
            if found is None:
                break
            self.draws.append(found)
        return self.draws[:row]

    def cursors(self, row: int) -> tuple[int, ...]:
        """Rows that each source has given before a place, counted."""
        counts = list(self.start)
        for source, _ in self.until(row):
            counts[source] += 1
        return tuple(counts)


def _walk(
    seed: int,
    sizes: Sequence[tuple[int, ...]],
    weightings: Sequence[Weighting],
    cursors: Sequence[int],
    max_epochs: int | None,
) -> Iterator[Draw]:
    given = list(cursors)
    owed = [Fraction(0)] * len(sizes)
    room = [math.inf if max_epochs is None else rows * max_epochs for rows, *_ in sizes]
    row = 0
    ends = [each.first_row for each in weightings[1:]]
    for version, (weighting, end) in enumerate(zip(weightings, [*ends, math.inf], strict=True)):
        while row < end:
            left = [given[k] < room[k] for k in range(len(sizes))]
            shares = _row_shares(weighting.weights, sizes, left)
            if not any(shares):
                return
            begun, before = row, list(given)
            owed = [due if share else Fraction(0) for due, share in zip(owed, shares, strict=True)]
            for source in _places(_key(seed, version), row, shares, owed):
                if row >= end or given[source] >= room[source]:
                    break
                yield source, given[source]
                given[source] += 1
                row += 1
            owed = [
                due + (row - begun) * share - (now - then)
                for due, share, now, then in zip(owed, shares, given, before, strict=True)
            ]


def _row_shares(
    weights: Sequence[int], sizes: Sequence[tuple[int, ...]], left: Sequence[bool]
) -> list[Fraction]:
    """Shares of rows that give these shares of tokens, among the sources with rows left."""
    demand = [
        Fraction(weight * rows, tokens) if weight and more else Fraction(0)
        for weight, (rows, tokens, *_), more in zip(weights, sizes, left, strict=True)
    ]
    if not any(demand):
        return demand
    return [Fraction(seats, WHOLE) for seats in _largest_remainder(demand, WHOLE)]


def _largest_remainder(demand: Sequence[Fraction], seats: int) -> list[int]:
    exact = [seats * each / sum(demand) for each in demand]
    found = [math.floor(each) for each in exact]
    for _ in range(seats - sum(found)):
        # the first of those that are furthest behind
        neediest = max(range(len(exact)), key=lambda k: (exact[k] - found[k], -k))
        found[neediest] += 1
    return found


def _places(
    key: int, first_row: int, shares: Sequence[Fraction], owed: Sequence[Fraction]
) -> Iterator[int]:
    """Sources, place by place, of the blocks that begin at a row."""
    row = first_row
    if any(owed):
        due = [max(Fraction(0), BLOCK * s + o) for s, o in zip(shares, owed, strict=True)]
        yield from _shuffled(key, row, _largest_remainder(due, BLOCK))
        row += BLOCK
    for quota in _quotas(tuple(shares)):
        yield from _shuffled(key, row, quota)
        row += BLOCK


def _quotas(shares: tuple[Fraction, ...]) -> Iterator[list[int]]:
    """Rows of each source in one block after the other: all that have fallen due, and then, seat by
    seat, the row that falls due next."""
    given, blocks = [0] * len(shares), 0
    while True:
        blocks += 1
        before = list(given)
        given = [
            max(have, math.floor(blocks * BLOCK * s)) for have, s in zip(given, shares, strict=True)
        ]
        for _ in range(blocks * BLOCK - sum(given)):
            open_ = [k for k, s in enumerate(shares) if given[k] < math.ceil(blocks * BLOCK * s)]
            nearest = min(open_, key=lambda k: (math.ceil((given[k] + 1) / (BLOCK * shares[k])), k))
            given[nearest] += 1
        yield [now - then for now, then in zip(given, before, strict=True)]


def _shuffled(key: int, row: int, quota: Sequence[int]) -> list[int]:
    block = [0] * BLOCK
    spots = iter(_spots(key, row))
    for source, count in enumerate(quota):
        for _ in range(count):
            block[next(spots)] = source
    return block


@lru_cache(maxsize=4096)
def _spots(key: int, row: int) -> tuple[int, ...]:
    """Places of a block, in the order of a hash."""
    return tuple(sorted(range(BLOCK), key=lambda place: _split_mix(key, row, place)))


def _split_mix(*words: int) -> int:
    value = 0
    for word in words:
        value = ((value ^ word) + 0x9E3779B97F4A7C15) & _MASK
        value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
        value ^= value >> 31
    return value


def _key(seed: int, version: int) -> int:
    text = f"{seed}\0{version}"
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1

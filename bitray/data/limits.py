"""Limits of a source, `max_documents` and `max_tokens`: which units are done, and how far.

Units count in order, and the one in which a limit falls is cut there; so what is listed depends on
the source alone. It is found in rounds: each does about as many units as are still missing, and a
unit that turns out to hold the end was either done with just what was left, or is done again so.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from bitray.data.sources import SourceSettings, Unit

BYTES_PER_TOKEN = 2
"""Less than text has, so that a first guess takes too few units rather than too many."""


@runtime_checkable
class Outcome(Protocol):
    """What is to be known of a unit that was done."""

    @property
    def documents(self) -> int:
        """Documents of all splits."""
        ...

    @property
    def tokens(self) -> int:
        """Tokens of all splits."""
        ...

    @property
    def cut(self) -> bool:
        """Whether the unit goes on after what was taken of it."""
        ...


class Left(NamedTuple):
    """What may still be taken of a source; None: as much as there is."""

    documents: int | None
    tokens: int | None

    @property
    def nothing(self) -> bool:
        """Whether the source is at its end."""
        return self.documents == 0 or self.tokens == 0

    def fits(self, documents: int, tokens: int) -> bool:
        """Whether so much may be taken."""
        few = self.documents is None or documents <= self.documents
        return few and (self.tokens is None or tokens <= self.tokens)

    def less(self, documents: int, tokens: int) -> "Left":
        """What is left when so much has been taken."""
        return Left(
            None if self.documents is None else self.documents - documents,
            None if self.tokens is None else self.tokens - tokens,
        )


def wanted(
    source: SourceSettings, units: Sequence[Unit], done: Mapping[int, Outcome]
) -> list[Unit]:
    """The units of a source that are to be done next, given what has been; none at its end."""
    left = Left(source.max_documents, source.max_tokens)
    if left == Left(None, None):
        return [unit for unit in units if unit.number not in done]
    kept, left = _kept(left, units, done)
    if len(kept) == len(units) or left.nothing or (kept and done[kept[-1]].cut):
        return []
    missing = [unit for unit in units[len(kept) :] if unit.number not in done]
    if units[len(kept)].number in done:  # it holds the end, and was done with more than is left
        missing = [units[len(kept)]]
    some = missing[: _guess(left, missing, [done[number] for number in kept])]
    return [unit._replace(documents=left.documents, tokens=left.tokens) for unit in some]


def listed(source: SourceSettings, units: Sequence[Unit], done: Mapping[int, Outcome]) -> list[int]:
    """Numbers of the units that make the source, once no more are wanted."""
    return _kept(Left(source.max_documents, source.max_tokens), units, done)[0]


def _kept(left: Left, units: Sequence[Unit], done: Mapping[int, Outcome]) -> tuple[list[int], Left]:
    """The first units, as far as they are done and within the limits, and what is left after."""
    kept: list[int] = []
    for unit in units:
        found = done.get(unit.number)
        if found is None or left.nothing or not left.fits(found.documents, found.tokens):
            break
        kept.append(unit.number)
        left = left.less(found.documents, found.tokens)
        if found.cut:
            break
    return kept, left


def _guess(left: Left, units: Sequence[Unit], before: Sequence[Outcome]) -> int:
    """How many units surely fit into what is left; at least one."""
    counts = []
    if left.tokens is not None:
        tokens = sum(found.tokens for found in before) / max(1, len(before))
        counts.append(left.tokens / (tokens or units[0].size / BYTES_PER_TOKEN or 1))
    if left.documents is not None:
        documents = sum(found.documents for found in before) / max(1, len(before))
        counts.append(left.documents / documents if documents else 1)
    return max(1, int(min(counts)))

"""Limits of a source, `max_documents` and `max_tokens`: which units are done, and how far.

Units count in order, and the one in which a limit falls is cut there; so what is listed depends on
the source alone. It is found in rounds: each does about as many units as are still missing, and a
unit that turns out to hold the end was either done with just what was left, or is done again so.
"""

from collections.abc import Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar, runtime_checkable

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


Found = TypeVar("Found", bound=Outcome)


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


class Taken(Generic[Found]):
    """The units of one source that are done, from its first one on and within its limits."""

    def __init__(self, source: SourceSettings, units: Sequence[Unit]) -> None:
        self.units = units
        self.results: list[Found] = []
        self.done = not units
        """Whether the source is at its end."""
        self._limits = Left(source.max_documents, source.max_tokens)
        self._left = self._limits
        self._early: dict[int, Found] = {}

    def add(self, number: int, result: Found) -> None:
        """A unit is done; those before it may not be."""
        self._early[number] = result
        while not self.done:
            found = self._early.get(len(self.results))
            if found is None or not self._left.fits(found.documents, found.tokens):
                return
            del self._early[len(self.results)]
            self.results.append(found)
            self._left = self._left.less(found.documents, found.tokens)
            whole = len(self.results) == len(self.units)
            self.done = whole or found.cut or self._left.nothing

    def missing(self) -> list[Unit]:
        """The units that are to be done next; none at the source's end."""
        if self.done:
            return []
        rest = self.units[len(self.results) :]
        missing = [unit for unit in rest if unit.number not in self._early]
        if self._limits == Left(None, None):
            return missing
        if rest[0].number in self._early:  # it holds the end, and was done with more than is left
            missing = [rest[0]]
        some = missing[: _guess(self._left, missing, self.results)]
        left = self._left
        return [unit._replace(documents=left.documents, tokens=left.tokens) for unit in some]


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

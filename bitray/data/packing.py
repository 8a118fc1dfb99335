"""Packing: documents of any length into rows of one length, with hardly any padding.

Streaming best fit decreasing. Documents wait until there are rows' worth of them to choose from,
then go, longest first, where they leave the least room. Measured on four small corpora at length
512: padding 0.8 %, against 1.8 % when each document is placed the moment it comes (and 4.9 % on the
worst of them) and 0.7 % when all of a source is sorted at once.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Int32

from bitray.settings import UserError

if TYPE_CHECKING:
    from bitray.models.batch import Batch

LOOK_AHEAD = 16
"""Rows' worth of waiting tokens per open bin; 4 gives 0.2 points more padding, 64 0.1 less."""


@dataclass(frozen=True)
class Row:
    """One training row: whole documents (or pieces of over-long ones) and then padding."""

    input_ids: Int32[np.ndarray, " length"]
    lengths: list[int]
    """Tokens of each document, in order; what is left of the row is padding (id 0)."""
    prompts: list[int]
    """Of each document, the tokens at its beginning that are read but not learnt."""


class PackedRows(NamedTuple):
    """Rows as they are read: documents one after the other, then padding."""

    input_ids: Int32[np.ndarray, "n length"]
    lengths: list[list[int]]
    """Tokens of each document, per row."""
    prompts: list[list[int]]
    """Tokens at the beginning of each document that are not learnt, per row."""

    def batch(self, source_id: Sequence[int] | None = None) -> "Batch":
        """All of them, of source 0 unless said otherwise."""
        # Readers, which are processes of their own, do without torch: it takes seconds to import.
        from bitray.models.batch import Batch

        sources = [0] * len(self.lengths) if source_id is None else source_id
        return Batch.from_rows(self.input_ids, self.lengths, sources, self.prompts)

    @classmethod
    def joined(cls, parts: Iterable["PackedRows"]) -> "PackedRows":
        """The rows of some after those of others."""
        ids, lengths, prompts = zip(*parts, strict=True)
        return cls(np.concatenate(ids), list(chain(*lengths)), list(chain(*prompts)))

    def part(self, start: int, stop: int) -> "PackedRows":
        """Some of them."""
        return PackedRows(
            self.input_ids[start:stop], self.lengths[start:stop], self.prompts[start:stop]
        )


class Piece(NamedTuple):
    """A document, or a part of one that was too long: never longer than a row."""

    arrival: int
    ids: np.ndarray
    prompt: int


class Packer:
    """The push form of `pack`, for whoever fills several streams at once."""

    def __init__(self, length: int, open_bins: int = 32) -> None:
        if length < 1 or open_bins < 0:
            raise UserError(
                f"packing needs length >= 1 and open_bins >= 0, not {length} and {open_bins}"
            )
        self.length = length
        self.open_bins = open_bins
        self.truncated = 0
        """Documents so far that were longer than a row and had to be cut."""
        self._arrivals = 0
        self._waiting: list[Piece] = []
        self._waiting_tokens = 0
        self._room: list[int] = []  # room left in each open bin, ascending; parallel to `_bins`
        self._bins: list[list[Piece]] = []

    def add(self, document: Sequence[int] | np.ndarray, prompt: int = 0) -> list[Row]:
        """Take one document; the rows that are thereby ready. An empty document vanishes.

        Of a document that is longer than a row, first the beginning of its `prompt` tokens goes, so
        that what is to be learnt stays whole where it fits; only that is cut into pieces.
        """
        ids = np.asarray(document, dtype=np.int32)
        assert prompt == 0 or prompt < len(ids), "something has to be learnt after a prompt"
        excess = max(len(ids) - self.length, 0)
        self.truncated += excess > 0
        dropped = min(excess, prompt)
        ids, prompt = ids[dropped:], prompt - dropped
        whole = max(len(ids) - 1, 0) // self.length  # full pieces; the remainder is 1..length ids
        rows = [self._row([self._piece(ids, at, prompt)]) for at in range(whole)]
        if len(ids):
            self._waiting.append(self._piece(ids, whole, prompt))
            self._waiting_tokens += len(ids) - whole * self.length
        if self.open_bins == 0 and self._waiting:
            rows.append(self._row([self._waiting.pop()]))
        elif self._waiting_tokens >= LOOK_AHEAD * self.open_bins * self.length:
            rows += self._place(keep=self.open_bins)
        return rows

    def flush(self) -> list[Row]:
        """All that is left, bins closed."""
        return self._place(keep=0)

    def _piece(self, ids: np.ndarray, at: int, prompt: int) -> Piece:
        assert prompt == 0 or len(ids) <= self.length, "a prompt gives way to what is learnt"
        self._arrivals += 1
        return Piece(self._arrivals, ids[at * self.length : (at + 1) * self.length], prompt)

    def _place(self, keep: int) -> list[Row]:
        """Best fit decreasing of what waits, on top of the open bins; `keep` of them stay open."""
        done = []
        for piece in sorted(self._waiting, key=lambda p: (-len(p.ids), p.arrival)):
            size = len(piece.ids)
            best = bisect_left(self._room, size)
            if best < len(self._room):
                room, content = self._room.pop(best) - size, self._bins.pop(best)
            else:
                room, content = self.length - size, []
            content.append(piece)
            if room:
                best = bisect_left(self._room, room)
                self._room.insert(best, room)
                self._bins.insert(best, content)
            else:
                done.append(content)
        self._waiting, self._waiting_tokens = [], 0
        fullest = max(len(self._bins) - keep, 0)
        done += self._bins[:fullest]
        del self._bins[:fullest], self._room[:fullest]
        for content in done:
            content.sort(key=lambda p: p.arrival)
        # In order of arrival again, so that the first rows are no sample of the longest documents.
        return [
            self._row(content) for content in sorted(done, key=lambda content: content[0].arrival)
        ]

    def _row(self, content: list[Piece]) -> Row:
        lengths = [len(piece.ids) for piece in content]
        row = np.zeros(self.length, np.int32)
        np.concatenate([piece.ids for piece in content], out=row[: sum(lengths)])
        return Row(row, lengths, [piece.prompt for piece in content])


def pack(
    documents: Iterable[Sequence[int] | np.ndarray], length: int, open_bins: int = 32
) -> Iterator[Row]:
    """Pack token documents of one source into rows of `length` tokens, deterministically.

    A document longer than `length` is cut into full rows, its remainder packed like any document;
    nothing else is cut, every token comes out exactly once, and within a row documents keep their
    order. Streaming: at most `17 * open_bins` rows' worth of tokens are held. `UserError` if
    `length` is below 1. With `open_bins` 0 nothing is packed: every document has a row of its own.
    """
    packer = Packer(length, open_bins)
    for document in documents:
        yield from packer.add(document)
    yield from packer.flush()

"""The work on one unit: read, split by hash, tokenise, pack, write its shards and then its result.

A function of the unit alone: who does it, and what else is done, changes no byte.
"""

import hashlib
import itertools
import os
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from bitray import storage
from bitray.data.job import (
    NOTHING,
    TOKENIZER,
    Job,
    Pinned,
    Task,
    UnitResult,
    check_files,
    check_skipped,
    inputs_of,
    result_name,
    shard_name,
)
from bitray.data.limits import Left
from bitray.data.manifest import KEPT_PLACES, SPLITS, Counts, Shard, Skipped, SplitName
from bitray.data.packing import Packer
from bitray.data.rows import Found
from bitray.data.settings import DataSettings, HeldOut
from bitray.data.shards import ShardWriter
from bitray.data.sources import Source, Unit
from bitray.data.tokenizer import SLICE, Encoder
from bitray.settings import UserError
from bitray.storage import FileInfo

BATCH = 1024
"""Documents tokenised at once, unless they are long."""
HOPELESS = 100
"""Bad rows after which a unit gives up, if they are also a tenth of what it has read."""


class Tally:
    """Counts the rows of a source, and tells which are documents."""

    def __init__(self, source: str, settings: DataSettings) -> None:
        self.rows = self.empty = self.filtered = self.bad = 0
        self.places: list[str] = []
        self.files: dict[str, str] = {}
        self._source, self._settings = source, settings

    def takes(self, found: Found) -> bool:
        """Count a row; whether it holds text. `UserError` if hardly any does, and for a file that
        cannot be read where none more may be."""
        if found.is_file:
            self.files[found.place] = found.problem
            check_files(self._source, self.skipped(), self._settings.max_bad_files)
            return False
        self.rows += 1
        if found.text is None and found.problem:
            self._skip(f"{found.place} ({found.problem})")
        elif found.text is None:
            self.filtered += 1
        elif not found.is_document:
            self.empty += 1
        return found.is_document

    def skipped(self) -> Skipped:
        """The bad rows and files so far."""
        return Skipped(count=self.bad, places=tuple(self.places), files=dict(self.files))

    def _skip(self, place: str) -> None:
        self.bad += 1
        if len(self.places) < KEPT_PLACES:
            self.places.append(place)
        allowed = self._settings.max_bad_rows
        if self.bad > max(HOPELESS, max(0.1, allowed) * self.rows):
            check_skipped(self._source, self.rows, self.skipped(), allowed)


def split_of(text: str, held_out: HeldOut) -> SplitName:
    """Where a document belongs: by its text alone, so equal documents stay on one side."""
    place = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) / 2**64
    if place < held_out.probe:
        return "probe"
    return "validation" if place < held_out.probe + held_out.validation else "train"


def documents(
    settings: DataSettings,
    split: SplitName = "train",
    max_bytes: int | None = None,
    pinned: Pinned = NOTHING,
) -> Iterator[str]:
    """Texts of one split of all sources, up to `max_bytes` of each: to train a tokenizer on."""
    for name, inputs in inputs_of(settings, pinned).items():
        left = float("inf") if max_bytes is None else max_bytes
        for text in _texts(name, inputs, settings):
            if split_of(text, settings.split) == split:
                left -= len(text.encode())
                if left < 0:
                    break
                yield text


def _texts(name: str, inputs: Sequence[FileInfo], settings: DataSettings) -> Iterator[str]:
    source, tally = settings.sources[name], Tally(name, settings)
    units = source.units(name, inputs, settings.unit_bytes)
    found = (one for unit in units for one in _rows(source, unit))
    for one in itertools.islice(filter(tally.takes, found), source.max_documents):
        yield f"{one.prompt}{one.text}"


# ---------------------------------------------------------------------------------------- one unit


class _Split:
    """The rows of one split of a unit, as they become ready."""

    def __init__(self, task: Task) -> None:
        self._packer = Packer(task.length, task.settings.open_bins)
        self._writer = ShardWriter(task.length)
        self._documents = self._tokens = 0

    def add(self, ids: np.ndarray, prompt: int) -> None:
        self._documents += 1
        self._tokens += len(ids)
        self._writer.add(self._packer.add(ids, prompt))

    def written(self, task: Task, name: str) -> Counts:
        """Close the shard and write it whole; no shard if there is no row."""
        self._writer.add(self._packer.flush())
        data = self._writer.close()
        if not self._writer.rows:
            return Counts()
        storage.write_bytes(storage.join(task.root_uri, name), data.to_pybytes())
        shard = Shard(
            name=name,
            rows=self._writer.rows,
            size=data.size,
            sha256=hashlib.sha256(data).hexdigest(),
        )
        return Counts(
            documents=self._documents,
            tokens=self._tokens,
            rows=shard.rows,
            truncated=self._packer.truncated,
            shards=(shard,),
        )


def run_unit(task: Task, unit: Unit, encoder: Encoder) -> UnitResult:
    """Do a unit. `UserError` for unreadable files beyond those allowed, or mostly bad rows."""
    settings = task.settings
    tally = Tally(unit.source, settings)
    splits = {split: _Split(task) for split in SPLITS}
    left, cut = Left(unit.documents, unit.tokens), False
    for found, ids, prompt in _encoded(settings.sources[unit.source], unit, encoder):
        if cut := found.is_document and not left.fits(1, len(ids)):
            break  # rows that are no documents count up to here, whatever limit the unit has
        if tally.takes(found):
            left = left.less(1, len(ids))
            split = split_of(f"{found.prompt}{found.text}", settings.split)
            splits[split].add(ids, prompt)
    counts = {
        split: rows.written(task, shard_name(unit.source, split, unit.number))
        for split, rows in splits.items()
    }
    result = UnitResult(
        job=task.job,
        source=unit.source,
        number=unit.number,
        input_rows=tally.rows,
        empty=tally.empty,
        filtered=tally.filtered,
        cut=cut,
        skipped=tally.skipped(),
        splits=counts,
    )
    uri = storage.join(task.root_uri, result_name(unit.source, unit.number))
    storage.write_json(uri, result.model_dump(mode="json"))
    return result


class UnitWorker:
    """`run_unit` as a callable for a pool of actors: a unit's JSON in, its result's JSON out."""

    def __init__(self, task: Task, threads: int) -> None:
        os.environ["RAYON_NUM_THREADS"] = str(threads)
        self._task = task
        backend = storage.read_text(storage.join(task.root_uri, TOKENIZER))
        self._encoder = Encoder(backend, task.end)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """`{"unit"}` to `{"result", "error"}`, one of which is empty."""
        try:
            result = run_unit(self._task, Unit.load(row["unit"]), self._encoder)
        except UserError as error:  # said once by the driver; retrying would not help
            return {"result": "", "error": str(error)}
        return {"result": result.model_dump_json(), "error": ""}


def unpacked(rows: Iterable[dict[str, str]]) -> Iterator[UnitResult]:
    """What `UnitWorker` returned; its errors raised here."""
    for row in rows:
        if row["error"]:
            raise UserError(row["error"])
        yield UnitResult.model_validate_json(row["result"])


def in_process(job: Job, units: Sequence[Unit]) -> Iterator[UnitResult]:
    """Do units here, one after the other, where there is no Ray."""
    worker = UnitWorker(job.task, os.cpu_count() or 1)
    yield from unpacked(worker({"unit": unit.dump()}) for unit in units)


def _encoded(
    source: Source, unit: Unit, encoder: Encoder
) -> Iterator[tuple[Found, np.ndarray, int]]:
    """Rows of a unit with their token ids, and how many of those are the prompt's."""
    for batch in _batches(_rows(source, unit)):
        prompts = encoder.encode([one.prompt for one in batch], end=False)
        texts = encoder.encode([one.text or "" for one in batch])
        for one, prompt, text in zip(batch, prompts, texts, strict=True):
            yield one, np.concatenate([prompt, text]), len(prompt)


def _rows(source: Source, unit: Unit) -> Iterator[Found]:
    """Rows of a unit, and in their order the files that cannot be read."""
    for part in unit.parts:
        try:
            yield from source.read(part)
        except storage.Unreadable as error:
            where, why = error.args
            yield Found(where, None, why, is_file=True)


def _batches(rows: Iterable[Found]) -> Iterator[list[Found]]:
    batch: list[Found] = []
    size = 0
    for row in rows:
        batch.append(row)
        size += len(row.prompt) + len(row.text or "")
        if size >= SLICE or len(batch) == BATCH:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch

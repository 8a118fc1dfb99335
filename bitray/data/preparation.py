"""A preparation under way: units end in any order, and training begins before the last of them.

What may be known while units are missing does not depend on which are done: of every source the
units that are done from its first one on, in whole windows of rows.
"""

import itertools
from collections.abc import Iterator, Sequence
from functools import cached_property

from bitray import storage
from bitray.data.job import (
    TOKENIZER,
    Job,
    UnitResult,
    Work,
    check_same,
    finished,
    manifest_of,
    summed,
)
from bitray.data.limits import Taken
from bitray.data.manifest import Manifest, SourceManifest, read_manifest, write_manifest
from bitray.data.progress import reported
from bitray.data.settings import DataSettings
from bitray.data.sources import Unit

BYTES_PER_TOKEN = 4
"""A guess at text, before the first unit of a source is done."""
MARGIN = 1.25
"""What is done at once of an opening, over the estimate: another round costs more than a unit."""


class _Stretch(Taken[UnitResult]):
    """The units of one source that are done, from its first one on.

    Its *opening* is the shortest such stretch that holds a window of training rows, or all of it.
    """

    def __init__(self, settings: DataSettings, name: str, units: Sequence[Unit]) -> None:
        super().__init__(settings.sources[name], units)
        self.window = settings.window
        self.rows = 0
        """Training rows."""

    def add(self, number: int, result: UnitResult) -> None:
        """A unit is done; those before it may not be."""
        before = len(self.results)
        super().add(number, result)
        self.rows += sum(each.splits["train"].rows for each in self.results[before:])

    @property
    def windows(self) -> tuple[int, bool]:
        """Whole windows of training rows, and whether that is all."""
        return self.rows // self.window, self.done

    @property
    def opened(self) -> bool:
        """Whether training may begin."""
        return any(self.windows)

    def missing_of_opening(self, row_bytes: float) -> list[Unit]:
        """Units that should complete it; `row_bytes` is a guess at the input of a row."""
        if self.opened:
            return []
        if self.rows:
            row_bytes = MARGIN * sum(map(_size, self.units[: len(self.results)])) / self.rows
        wanted, units = (self.window - self.rows) * row_bytes, self.missing()
        ends = itertools.accumulate(map(_size, units))
        return [unit for unit, end in zip(units, ends, strict=True) if end - _size(unit) < wanted]


def _size(unit: Unit) -> int:
    return sum(part.size for part in unit.parts)


class Preparation:
    """A job, what is done of it, and its manifest as far as it may be known."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.manifest = read_manifest(job.root_uri)
        """What may be known by now; None until every source has its opening."""
        if self.manifest is not None:
            check_same(job, self.manifest)
        self._published: list[tuple[int, bool]] = []
        self._told: set[str] = set()

    @cached_property
    def _stretches(self) -> dict[str, _Stretch]:
        stretches = {
            name: _Stretch(self.job.settings, name, units)
            for name, units in self.job.units_of.items()
        }
        for result in finished(self.job):
            stretches[result.source].add(result.number, result)
        return stretches

    def open(self, work: Work) -> Manifest:
        """Have `work` do the openings where they are missing; what is known then."""
        if self.manifest is not None and self.manifest.done:
            return self.manifest
        storage.write_text(storage.join(self.job.root_uri, TOKENIZER), self.job.backend)
        self._publish()
        row_bytes = float(self.job.length * BYTES_PER_TOKEN)
        while not all(stretch.opened for stretch in self._stretches.values()):
            some = (s.missing_of_opening(row_bytes) for s in self._stretches.values())
            for _ in self._doing(work, list(itertools.chain(*some))):
                pass
        assert self.manifest is not None
        return self.manifest

    def rest(self, work: Work) -> Iterator[bool]:
        """Have `work` do what is missing after `open`; after every unit, whether more is known."""
        assert self.manifest is not None
        while not self.manifest.done:  # once, unless sources have limits
            missing = [stretch.missing() for stretch in self._stretches.values()]
            yield from self._doing(work, list(itertools.chain(*missing)))

    def _doing(self, work: Work, units: list[Unit]) -> Iterator[bool]:
        # Side by side, for training needs rows of all sources at a time.
        units.sort(key=lambda unit: unit.number)
        for result in reported(work(self.job, units), len(units)):
            stretch = self._stretches[result.source]
            stretch.add(result.number, result)
            self._tell(result)
            if stretch.done:
                self._sum(result.source)  # a hopeless one ends the job early
            yield self._publish()

    def _tell(self, result: UnitResult) -> None:
        """Of every file that could not be read, once."""
        for file in result.skipped.files.keys() - self._told:
            why = result.skipped.files[file]
            print(f"prepare: {result.source}: skipped {file}: {why}", flush=True)
            self._told.add(file)

    def _publish(self) -> bool:
        """Write the manifest if more is known than before."""
        windows = [stretch.windows for stretch in self._stretches.values()]
        if windows == self._published or not all(map(any, windows)):
            return False
        sources = {name: self._sum(name) for name in self._stretches}
        self.manifest, self._published = manifest_of(self.job, sources), windows
        write_manifest(self.job.root_uri, self.manifest)
        if self.manifest.done:
            for name, source in sources.items():
                print(f"prepare: {source.sentence(name)}")
        return True

    def _sum(self, name: str) -> SourceManifest:
        stretch = self._stretches[name]
        return summed(self.job, name, stretch.results, stretch.done)


def run_job(job: Job, work: Work) -> Manifest:
    """Have `work` do the units that are missing, in any order, and write the manifest."""
    preparation = Preparation(job)
    preparation.open(work)
    for _ in preparation.rest(work):
        pass
    assert preparation.manifest is not None
    return preparation.manifest

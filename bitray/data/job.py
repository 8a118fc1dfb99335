"""A preparation as data: what is to be prepared, which parts of it are done, what came of it.

No Ray and no tokenising in here; `units` does the work on one unit, `prepare` spreads it.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from bitray import storage
from bitray.data.manifest import (
    SPLITS,
    Counts,
    Manifest,
    Skipped,
    SourceManifest,
    SplitName,
    digest,
    parts_of,
)
from bitray.data.settings import DataSettings
from bitray.data.shards import group_rows
from bitray.data.sources import ASIDE, Unit
from bitray.data.tokenizer import backend_json, end_token_id, tokenizer_identity, vocabulary
from bitray.settings import Settings, UserError, listed
from bitray.storage import FileInfo

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3
"""Places of bad rows in a message."""
TOKENIZER = "tokenizer.json"
"""Where, within the prepared folder, workers find the tokenizer."""


@dataclass(frozen=True)
class Task:
    """All that a worker needs to know beside its unit; small, because it travels to each."""

    job: str
    """Identity of the job."""
    settings: DataSettings
    length: int
    root_uri: str
    end: int


@dataclass(frozen=True)
class Job:
    """All that is to be done, as the driver sees it."""

    settings: DataSettings
    inputs: Mapping[str, Sequence[FileInfo]]
    length: int
    root_uri: str
    tokenizer: str
    """Its identity."""
    backend: str
    end: int
    vocab_size: int

    @cached_property
    def made_from(self) -> dict[str, Any]:
        """Everything that determines the rows; weights, seed and number of workers do not."""
        settings = self.settings
        return {
            "length": self.length,
            "tokenizer": self.tokenizer,
            "split": settings.split.model_dump(mode="json"),
            "open_bins": settings.open_bins,
            "unit_bytes": settings.unit_bytes,
            "window": settings.window,
            "sources": {
                name: {
                    "settings": source.model_dump(mode="json", exclude=ASIDE),
                    "inputs": [list(one) for one in self.inputs[name]],
                }
                for name, source in settings.sources.items()
            },
        }

    @property
    def parts(self) -> dict[str, str]:
        """What `identity` is the hash of, part by part, in short."""
        return parts_of(self.made_from)

    @cached_property
    def identity(self) -> str:
        """Hash of `made_from` and of the order of the sources, which numbers them."""
        return digest([self.made_from, list(self.settings.sources)])

    @cached_property
    def units_of(self) -> dict[str, list[Unit]]:
        """All units of every source, in order; those beyond its limits too."""
        return {
            name: source.units(name, self.inputs[name], self.settings.unit_bytes)
            for name, source in self.settings.sources.items()
        }

    @property
    def units(self) -> list[Unit]:
        """All units, source by source."""
        return [unit for units in self.units_of.values() for unit in units]

    @property
    def task(self) -> Task:
        """The workers' share of this."""
        return Task(self.identity, self.settings, self.length, self.root_uri, self.end)


class UnitResult(Settings):
    """What became of a unit: kept beside its shards, where it says that the unit is done."""

    job: str
    source: str
    number: int
    input_rows: int
    empty: int
    filtered: int
    cut: bool
    """Whether a limit ended it before its own end."""
    skipped: Skipped
    splits: dict[SplitName, Counts]

    @property
    def documents(self) -> int:
        """Of all splits."""
        return sum(counts.documents for counts in self.splits.values())

    @property
    def tokens(self) -> int:
        """Of all splits."""
        return sum(counts.tokens for counts in self.splits.values())


Work = Callable[[Job, Sequence[Unit]], Iterator[UnitResult]]
"""Does units, in any order."""


Pinned = Mapping[str, Sequence[FileInfo]]
"""Inputs on the Hub as they once were, by what sources call them there (`SourceSettings.hub`)."""
NOTHING: Pinned = MappingProxyType({})


def inputs_of(settings: DataSettings, pinned: Pinned = NOTHING) -> dict[str, Sequence[FileInfo]]:
    """The inputs of every source: the `pinned` ones, and what the others have now. `UserError`
    naming the sources that are not there or empty."""
    inputs, wrong = {}, []
    for name, source in settings.sources.items():
        try:
            inputs[name] = pinned.get(source.hub) or source.inputs()
        except UserError as error:
            wrong.append(f"source '{name}': {error}")
    if wrong:
        raise UserError(listed(wrong))
    return inputs


def plan_job(
    settings: DataSettings,
    tokenizer: "PreTrainedTokenizerBase",
    length: int,
    root_uri: str,
    pinned: Pinned = NOTHING,
) -> Job:
    """List all inputs. `UserError` for a source that is not there or holds no file."""
    return Job(
        settings=settings,
        inputs=inputs_of(settings, pinned),
        length=length,
        root_uri=root_uri,
        tokenizer=tokenizer_identity(tokenizer),
        backend=backend_json(tokenizer),
        end=end_token_id(tokenizer),
        vocab_size=vocabulary(tokenizer),
    )


def result_name(source: str, number: int) -> str:
    """Where, within the prepared folder, the result of a unit lies."""
    return f"{source}/unit-{number:06d}.json"


def shard_name(source: str, split: SplitName, number: int) -> str:
    """Where, within the prepared folder, the rows of a unit and split lie."""
    return f"{source}/{split}-{number:06d}.arrow"


def finished(job: Job) -> Iterator[UnitResult]:
    """Results that an interrupted run of the same job left, if their shards are all there."""
    if not storage.exists(job.root_uri):
        return
    files = storage.list_files(job.root_uri)
    sizes = {"/".join(file.uri.split("/")[-2:]): file.size for file in files}
    for unit in job.units:
        name = result_name(unit.source, unit.number)
        if name not in sizes:
            continue
        values = storage.read_json(storage.join(job.root_uri, name))
        if values.get("job") != job.identity:
            continue
        result = UnitResult.model_validate(values)
        shards = [shard for counts in result.splits.values() for shard in counts.shards]
        if all(sizes.get(shard.name) == shard.size for shard in shards):
            yield result


def manifest_of(job: Job, sources: Mapping[str, SourceManifest]) -> Manifest:
    """The manifest of a job whose sources are all done."""
    return Manifest(
        job=job.identity,
        length=job.length,
        group_rows=group_rows(job.length),
        window=job.settings.window,
        tokenizer=job.tokenizer,
        vocab_size=job.vocab_size,
        eos_token_id=job.end,
        made_from=job.made_from,
        sources={name: sources[name] for name in job.settings.sources},
    )


def summed(job: Job, name: str, results: Sequence[UnitResult], done: bool = True) -> SourceManifest:
    """A source from the results of its units, all that count or those from the first on.

    `UserError` if too many of its rows were bad, of all or up to the end of any window, so that
    what stops the job does not depend on how far it has come; or too many files; or if nothing is
    left to train on.
    """
    source = job.settings.sources[name]
    splits, opening = dict.fromkeys(SPLITS, Counts()), dict.fromkeys(SPLITS, Counts())
    counted, skipped = Counter[str](), Skipped()
    for result in results:
        counted.update(rows=result.input_rows, empty=result.empty, filtered=result.filtered)
        skipped = skipped.plus(result.skipped)
        windows = splits["train"].rows // job.settings.window
        splits = {split: splits[split].plus(result.splits[split]) for split in SPLITS}
        opening = opening if windows else splits
        if splits["train"].rows // job.settings.window > windows:
            check_skipped(name, counted["rows"], skipped, job.settings.max_bad_rows)
        check_files(name, skipped, job.settings.max_bad_files)
    found = SourceManifest(
        licence=source.licence,
        input_rows=counted["rows"],
        empty=counted["empty"],
        filtered=counted["filtered"],
        limited=done and (results[-1].cut or len(results) < len(job.units_of[name])),
        skipped=skipped,
        splits=splits,
        opening={
            split: counts.model_copy(update={"shards": ()}) for split, counts in opening.items()
        },
        done=done,
    )
    if done:
        check_skipped(name, found.input_rows, skipped, job.settings.max_bad_rows)
        _check_trainable(name, found)
    return found


def check_skipped(name: str, rows: int, skipped: Skipped, share: float) -> None:
    """`UserError` if more than `share` of the rows were bad; one may be, unless none may."""
    if skipped.count > max(share > 0, int(share * rows)):
        places = "; ".join(skipped.places[:SHOWN])
        raise UserError(
            f"source '{name}': {skipped.count} of {rows} rows are unusable, more than "
            f"data.max_bad_rows={share:g} allows; the first: {places}"
        )


def check_files(name: str, skipped: Skipped, most: int) -> None:
    """`UserError` if more than `most` files could not be read."""
    if len(skipped.files) > most:
        *_, (file, why) = skipped.files.items()
        raise UserError(
            f"source '{name}': {file}: {why}; data.max_bad_files={most} allows "
            f"no {'more' if most else 'such'} files"
        )


def _check_trainable(name: str, source: SourceManifest) -> None:
    documents = {split: counts.documents for split, counts in source.splits.items()}
    if not sum(documents.values()):
        raise UserError(
            f"source '{name}' holds no document ({source.input_rows} rows, {source.empty} empty, "
            f"{source.filtered} left out by its filters, {source.skipped.count} unusable)"
        )
    if not documents["train"]:
        raise UserError(
            f"source '{name}': data.split holds out all of its {sum(documents.values())} documents"
        )


def check_same(job: Job, manifest: Manifest) -> None:
    """`UserError` naming what differs if a folder was prepared from something else."""
    if manifest.job == job.identity:
        return
    now, then = job.parts, parts_of(manifest.made_from)
    other = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    raise UserError(
        f"{job.root_uri} was prepared from something else ({', '.join(other)} "
        "differs); choose another data.prepared_dir or delete it"
    )

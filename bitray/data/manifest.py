"""The manifest of prepared data: what was read, what became of it, and where the rows lie.

Layout of a prepared folder: `manifest.json`, and per source `{source}/{split}-{unit}.arrow` with
`{source}/unit-{unit}.json`, the counts that also say that this unit is done. While the rest is
being prepared, the manifest speaks of the units that are done from the first of each source on.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from bitray import storage
from bitray.data.plan import SourceSize
from bitray.settings import Settings, UserError, nearest

FORMAT = 3
NAME = "manifest.json"
KEPT_PLACES = 20
SplitName = Literal["train", "probe", "validation"]
SPLITS: tuple[SplitName, ...] = ("train", "probe", "validation")


def digest(value: Any) -> str:
    """sha256 of a JSON-able value, however its keys were ordered."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def parts_of(made_from: Mapping[str, Any]) -> dict[str, str]:
    """Short hashes of what rows were made from, by name, to say what differs."""
    whole = {name: value for name, value in made_from.items() if name != "sources"}
    sources = made_from.get("sources", {})
    named = whole | {f"source '{name}'": value for name, value in sources.items()}
    named |= {"the order of sources": list(sources)}
    return {name: digest(value)[:12] for name, value in named.items()}


class Shard(Settings):
    """One file of rows of one unit and split, by its name within the prepared folder."""

    name: str
    rows: int
    size: int
    sha256: str


class Counts(Settings):
    """What became of some documents of one split."""

    documents: int = 0
    tokens: int = 0
    """Real ones, each document's end token included, padding not."""
    rows: int = 0
    truncated: int = 0
    """Documents longer than a row: their prompt cut, or what is learnt of them in several."""
    shards: tuple[Shard, ...] = ()

    def plus(self, other: "Counts") -> "Counts":
        """Both together, shards in order."""
        names = type(self).model_fields
        return Counts(**{name: getattr(self, name) + getattr(other, name) for name in names})


class Skipped(Settings):
    """Rows that could not be read as documents, and where the first of them are."""

    count: int = 0
    places: tuple[str, ...] = ()
    files: dict[str, str] = {}
    """Files that are damaged or gone, and what is wrong with each; what came before that counts."""

    def plus(self, other: "Skipped") -> "Skipped":
        """Both together; of the places only the first few."""
        places = (*self.places, *other.places)[:KEPT_PLACES]
        files = {**self.files, **other.files}
        return Skipped(count=self.count + other.count, places=places, files=files)


class SourceManifest(Settings):
    """One source: what it held, and its counts per split."""

    licence: str = "unknown"
    input_rows: int = 0
    """Documents, empty ones, filtered ones and skipped ones."""
    empty: int = 0
    filtered: int = 0
    """Left out by the source's filters."""
    limited: bool = False
    """Whether the source goes on after its `max_documents` or `max_tokens`."""
    skipped: Skipped = Skipped()
    splits: dict[SplitName, Counts]
    opening: dict[SplitName, Counts] = {}
    """Of the first units, those that hold a window of training rows, without their shards; all if
    not given. What has to be the same however far preparing has come is taken from them."""
    done: bool = True
    """Whether that is all of it."""

    def opened(self, split: SplitName) -> Counts:
        """Counts of the opening, whose rows are the first ones."""
        return self.opening.get(split, self.splits[split])

    def size(self, window: int) -> SourceSize:
        """What a plan with such windows may count on."""
        rows, opened = self.splits["train"].rows, self.opened("train")
        there = rows if self.done else rows // window * window
        return SourceSize(there, opened.tokens, opened.rows, self.done, window)

    def sentence(self, name: str) -> str:
        """What became of it, for people."""
        train, probe, validation = (self.splits[split] for split in SPLITS)
        text = (
            f"{name}: {train.documents:,} documents, {train.tokens:,} tokens in {train.rows:,} "
            f"rows to train on, {train.truncated:,} of them cut; held out {probe.documents:,} "
            f"to probe and {validation.documents:,} to validate; {self.empty:,} empty"
        )
        if self.filtered:
            text += f", {self.filtered:,} filtered out"
        if self.limited:
            text += "; its limit is reached"
        if self.skipped.files:
            text += f"; {len(self.skipped.files):,} files unreadable"
        if not self.skipped.count:
            return text
        return f"{text}; {self.skipped.count:,} unusable, the first: {self.skipped.places[0]}"


class Manifest(Settings):
    """Everything about a prepared folder. The order of `sources` numbers them (`source_id`)."""

    format: int = FORMAT
    job: str
    """Identity of inputs, tokenizer and settings: all that determines the prepared bytes."""
    length: int
    group_rows: int
    """Rows per record batch of a shard; only the last one of a shard is shorter."""
    window: int
    """Rows that are permuted among themselves."""
    tokenizer: str
    vocab_size: int
    eos_token_id: int
    made_from: dict[str, Any]
    """What `job` is the hash of: settings, and every input with uri, size and identity."""
    sources: dict[str, SourceManifest]

    def identity(self) -> str:
        """Hash of what the rows were made from; equal hashes mean equal rows."""
        return self.job

    @property
    def parts(self) -> dict[str, str]:
        """What the identity is the hash of, part by part, in short."""
        return parts_of(self.made_from)

    @property
    def done(self) -> bool:
        """Whether everything is prepared."""
        return all(source.done for source in self.sources.values())

    def sizes(self) -> dict[str, SourceSize]:
        """What a plan may count on of every source, in their order."""
        return {name: source.size(self.window) for name, source in self.sources.items()}

    def counts(self, source: str, split: SplitName) -> Counts:
        """Counts of one split; `UserError` with the nearest name for an unknown source."""
        if source not in self.sources:
            raise UserError(f"no prepared source '{source}'{nearest(source, self.sources)}")
        return self.sources[source].splits[split]

    def num_rows(self, source: str, split: SplitName = "train") -> int:
        """Rows of `[length]` tokens in one split of a source."""
        return self.counts(source, split).rows

    def padding(self, sources: Iterable[str] | None = None, split: SplitName = "train") -> float:
        """Share of positions that hold no token, over the given sources or all."""
        chosen = [self.counts(s, split) for s in (self.sources if sources is None else sources)]
        positions = sum(c.rows for c in chosen) * self.length
        return 1 - sum(c.tokens for c in chosen) / positions if positions else 0.0


def write_manifest(root_uri: str, manifest: Manifest) -> None:
    """Write it after what it speaks of: a folder whose manifest is done is complete."""
    storage.write_json(storage.join(root_uri, NAME), manifest.model_dump(mode="json"))


def read_manifest(root_uri: str) -> Manifest | None:
    """The manifest of a folder, maybe of one that is still being prepared, or None."""
    uri = storage.join(root_uri, NAME)
    if not storage.exists(uri):
        return None
    values = storage.read_json(uri)
    if values.get("format") != FORMAT:
        raise UserError(f"{uri}: format {values.get('format')} is not {FORMAT}; prepare it again")
    return Manifest.model_validate(values)

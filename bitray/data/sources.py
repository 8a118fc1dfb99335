"""Where documents come from: a tagged union of settings on `type`, each of which can read itself.

A source names its inputs, cuts them into fixed units of work, and reads the documents of a unit.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag

from bitray import storage
from bitray.data import embedded, huggingface, synthetic
from bitray.data.formats import SUFFIXES, Part, read_part, split_file, suffix
from bitray.data.rows import Found, RowSettings
from bitray.settings import Settings, UserError
from bitray.storage import FileInfo

ASIDE = {"weight", "licence", "probe", "max_epochs"}
"""Settings of a source that do not change its rows."""


class Unit(NamedTuple):
    """A fixed range of one source's input: what one task reads, packs and writes."""

    source: str
    number: int
    parts: tuple[Part, ...]
    documents: int | None = None
    """At most so many of it; see `limits`."""
    tokens: int | None = None

    def dump(self) -> str:
        """As JSON, to travel between processes."""
        return json.dumps(self)

    @classmethod
    def load(cls, text: str) -> "Unit":
        """The unit that `dump` wrote."""
        source, number, parts, *limits = json.loads(text)
        return cls(source, number, tuple(Part(*part) for part in parts), *limits)

    @property
    def size(self) -> int:
        """Bytes of text, roughly."""
        return sum(part.size for part in self.parts)


class SourceSettings(Settings):
    """What all sources have in common."""

    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Share of training tokens, relative to the other sources' weights."""
    max_epochs: int | None = Field(None, ge=1)
    """Times that it may be gone through; None: as `data.max_epochs` says."""
    licence: str = "unknown"
    """Recorded in the manifest and the model card."""
    probe: str | None = None
    """Name of the domain that its probe documents stand for; None: the source's own."""
    max_documents: int | None = Field(None, ge=1)
    """Documents of the source, held-out ones included: the first so many in reading order."""
    max_tokens: int | None = Field(None, ge=1)
    """As `max_documents`, whole documents as long as they fit."""

    @property
    def hub(self) -> str:
        """What it is called on the Hugging Face Hub, where its inputs may change; "" if it lies
        elsewhere."""
        return ""

    def inputs(self) -> list[FileInfo]:
        """Every input with size and identity. `UserError` if there is none."""
        raise NotImplementedError

    def parts(self, inputs: Sequence[FileInfo], unit_bytes: int) -> Iterator[Part]:
        """The inputs in reading order, big ones in pieces of about `unit_bytes`."""
        raise NotImplementedError

    def read(self, part: Part) -> Iterator[Found]:
        """Documents of one part, or what is wrong with them, streaming; then `Unreadable`, where
        the part cannot be read to its end."""
        raise NotImplementedError

    def units(self, name: str, inputs: Sequence[FileInfo], unit_bytes: int) -> list[Unit]:
        """Units of about `unit_bytes`: a function of the inputs, whoever works on them."""
        groups: list[list[Part]] = []
        size = 0
        for part in self.parts(inputs, unit_bytes):
            if not groups or size + part.size > unit_bytes:
                groups.append([])
                size = 0
            groups[-1].append(part)
            size += part.size
        return [Unit(name, number, tuple(parts)) for number, parts in enumerate(groups)]


class LocalSource(SourceSettings, RowSettings):
    """Files: a folder, a file or a glob; local, in object storage, or on the Hugging Face Hub."""

    type: Literal["local"] = "local"
    path: str
    """Folder, file or glob of parquet, jsonl or json lines (also .gz, .zst) or txt: local, s3://,
    gs:// or hf://datasets/OWNER/NAME[@REVISION]/...; a run goes on with the commit that it began
    with, whatever a branch is by then."""
    document_separator: str | None = Field(None, min_length=1)
    """Between the documents of a txt file; by default a file is one document."""

    @property
    def hub(self) -> str:
        """Its path."""
        return self.path if self.path.startswith("hf://") else ""

    def inputs(self) -> list[FileInfo]:
        """The files, sorted by name."""
        files = storage.list_files(self.path)
        known = [file for file in files if suffix(file.uri)]
        if not known:
            found = f"its {len(files)} files are of other kinds" if files else "it is empty"
            raise UserError(f"{self.path}: no {', '.join(SUFFIXES)} file in it ({found})")
        return known

    def parts(self, inputs: Sequence[FileInfo], unit_bytes: int) -> Iterator[Part]:
        """In an order that follows no name, so that every stretch of units is a fair sample."""
        base = _common_folder([file.uri for file in inputs])
        for file in sorted(inputs, key=lambda f: _scattered(f.uri[base:])):
            yield from split_file(file, unit_bytes)

    def read(self, part: Part) -> Iterator[Found]:
        """See `formats.read_part`."""
        return read_part(part, self, self.document_separator)


class StreamingSource(SourceSettings, RowSettings):
    """A dataset of the Hub, or a local folder laid out like one, that only `datasets` can read.

    A unit is a shard of it. Where there are parquet files, `local` with `hf://` is quicker.
    """

    type: Literal["streaming"] = "streaming"
    path: str
    """OWNER/NAME, or a folder."""
    name: str | None = None
    """Of the configuration; None: the default one."""
    split: str = "train"
    revision: str | None = None
    """Branch, tag or commit; a run goes on with the commit that it is when the run begins."""

    @property
    def hub(self) -> str:
        """All that names it."""
        local = storage.is_local_folder(self.path)
        return "" if local else json.dumps([self.path, self.name, self.split, self.revision])

    def inputs(self) -> list[FileInfo]:
        """One: the dataset at its commit."""
        wanted = huggingface.Dataset(self.path, self.name, self.split, self.revision)
        dataset, identity = huggingface.pinned(wanted)
        return [FileInfo(json.dumps(dataset), huggingface.shard_count(dataset), identity)]

    def parts(self, inputs: Sequence[FileInfo], unit_bytes: int) -> Iterator[Part]:
        """The shards, in an order of their own."""
        for shard in sorted(range(inputs[0].size), key=lambda k: _scattered(str(k))):
            yield Part(inputs[0].uri, shard, shard + 1, unit_bytes)

    def read(self, part: Part) -> Iterator[Found]:
        """The rows of a shard."""
        dataset = huggingface.Dataset(*json.loads(part.uri))
        for number, row in enumerate(huggingface.shard_rows(dataset, part.start)):
            place = f"{dataset.path} shard {part.start} row {number}"
            yield self.found(place, partial(dict, row))


class EmbeddedSource(SourceSettings):
    """The corpus that every Python carries along (see `embedded`); no files, no network."""

    type: Literal["embedded"] = "embedded"
    domain: embedded.Domain
    licence: str = "PSF-2.0 (Python standard library) or generated"
    max_bytes: int | None = Field(None, ge=1)
    """None: 2.4 MB of code, 1.2 MB of prose, 0.7 MB of arithmetic."""

    def inputs(self) -> list[FileInfo]:
        """The interpreter itself: the same version gives the same documents."""
        identity = f"{platform.python_implementation()} {platform.python_version()}"
        size = self.max_bytes or embedded.DEFAULT_BYTES[self.domain]
        return [FileInfo(f"embedded:{self.domain}", size, f"{identity} r{embedded.REVISION}")]

    def parts(self, inputs: Sequence[FileInfo], unit_bytes: int) -> Iterator[Part]:
        """One part: it is small."""
        yield Part(inputs[0].uri, 0, None, inputs[0].size)

    def read(self, part: Part) -> Iterator[Found]:
        """The documents of the domain."""
        for number, text in enumerate(embedded.documents(self.domain, self.max_bytes)):
            yield Found(f"{part.uri} document {number}", text)


class SyntheticSource(SourceSettings):
    """Random words (see `synthetic`); no files, no network."""

    type: Literal["synthetic"] = "synthetic"
    licence: str = "generated"
    seed: int = 0
    max_bytes: int = Field(20_000_000, ge=1)

    def inputs(self) -> list[FileInfo]:
        """The seed: the same one gives the same documents."""
        return [FileInfo(f"synthetic:{self.seed}", self.max_bytes, f"r{synthetic.REVISION}")]

    def parts(self, inputs: Sequence[FileInfo], unit_bytes: int) -> Iterator[Part]:
        """One part: documents are made one after the other."""
        yield Part(inputs[0].uri, 0, None, inputs[0].size)

    def read(self, part: Part) -> Iterator[Found]:
        """The documents of the seed."""
        for number, text in enumerate(synthetic.documents(self.seed, self.max_bytes)):
            yield Found(f"{part.uri} document {number}", text)


def _tag(value: Any) -> Any:
    """Files need no `type`."""
    return (
        value.get("type", "local") if isinstance(value, dict) else getattr(value, "type", "local")
    )


Source = Annotated[
    Annotated[LocalSource, Tag("local")]
    | Annotated[StreamingSource, Tag("streaming")]
    | Annotated[EmbeddedSource, Tag("embedded")]
    | Annotated[SyntheticSource, Tag("synthetic")],
    Discriminator(_tag),
]


def _common_folder(uris: Sequence[str]) -> int:
    """Length of the folder that all share, so that moving a corpus does not reorder it."""
    first, last = min(uris), max(uris)
    same = next(
        (k for k, (a, b) in enumerate(zip(first, last, strict=False)) if a != b),
        min(len(first), len(last)),
    )
    return first.rfind("/", 0, same) + 1


def _scattered(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()

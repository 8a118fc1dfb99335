"""Where documents come from: a tagged union of settings on `type`, each of which can read itself.

A source names its inputs, cuts them into fixed units of work, and reads the documents of a unit.
"""

import hashlib
import json
import platform
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal, NamedTuple

from pydantic import Discriminator, Field, Tag, field_validator

from bitray import storage
from bitray.data import embedded
from bitray.data.formats import SUFFIXES, Found, How, Part, read_part, split_file, suffix
from bitray.settings import Settings, UserError
from bitray.storage import FileInfo


class Unit(NamedTuple):
    """A fixed range of one source's input: what one task reads, packs and writes."""

    source: str
    number: int
    parts: tuple[Part, ...]

    def dump(self) -> str:
        """As JSON, to travel between processes."""
        return json.dumps(self)

    @classmethod
    def load(cls, text: str) -> "Unit":
        """The unit that `dump` wrote."""
        source, number, parts = json.loads(text)
        return cls(source, number, tuple(Part(*part) for part in parts))


class SourceSettings(Settings):
    """What all sources have in common."""

    weight: float = Field(1.0, ge=0, allow_inf_nan=False)
    """Share of training tokens, relative to the other sources' weights."""
    max_epochs: int | None = Field(None, ge=1)
    """Times that it may be gone through; None: as `data.max_epochs` says."""
    licence: str = "unknown"
    """Recorded in the manifest and the model card."""

    def inputs(self) -> list[FileInfo]:
        """Every input with size and identity. `UserError` if there is none."""
        raise NotImplementedError

    def parts(self, inputs: Sequence[FileInfo], unit_bytes: int) -> Iterator[Part]:
        """The inputs in reading order, big ones in pieces of about `unit_bytes`."""
        raise NotImplementedError

    def read(self, part: Part) -> Iterator[Found]:
        """Documents of one part, or what is wrong with them, streaming."""
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


class LocalSource(SourceSettings):
    """Files: a folder, a file or a glob, local or in object storage."""

    type: Literal["local"] = "local"
    path: str
    """Folder, file or glob of parquet, jsonl, jsonl.gz, jsonl.zst or txt; local, s3:// or gs://."""
    columns: tuple[str, ...] = Field(("text",), min_length=1)
    """The columns that make a document, joined in this order."""
    separator: str = "\n\n"
    """Between joined columns."""
    document_separator: str | None = Field(None, min_length=1)
    """Between the documents of a txt file; by default a file is one document."""

    @field_validator("columns", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

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
        return read_part(part, How(self.columns, self.separator, self.document_separator))


class EmbeddedSource(SourceSettings):
    """The corpus that every Python carries along (see `embedded`); no files, no network."""

    type: Literal["embedded"] = "embedded"
    domain: embedded.Domain
    licence: str = "PSF-2.0 (Python standard library) or generated"
    max_documents: int | None = Field(None, ge=1)
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
        texts = embedded.documents(self.domain, self.max_documents, self.max_bytes)
        for number, text in enumerate(texts):
            yield Found(f"{part.uri} document {number}", text)


def _tag(value: Any) -> Any:
    """Files need no `type`."""
    return (
        value.get("type", "local") if isinstance(value, dict) else getattr(value, "type", "local")
    )


Source = Annotated[
    Annotated[LocalSource, Tag("local")] | Annotated[EmbeddedSource, Tag("embedded")],
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

"""Reading documents out of files: parquet, jsonl (plain, gzip, zstd) and text, always streaming.

A reader yields `Found`: a text with its place, or the reason why there is none. How many bad rows
are too many is decided elsewhere. A file that cannot be read at all is a `UserError` naming it.
"""

import io
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bitray import storage
from bitray.settings import UserError, nearest

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".txt")
_CHUNK = 1 << 20


class Found(NamedTuple):
    """A document's text, or None and the problem with it."""

    place: str
    text: str | None
    problem: str = ""


class Part(NamedTuple):
    """A fixed range of one input: bytes of a jsonl file, row groups of a parquet file, or all."""

    uri: str
    start: int
    stop: int | None
    size: int
    """Bytes, for balance only."""


class How(NamedTuple):
    """What of a file makes a document."""

    columns: tuple[str, ...]
    separator: str
    """Between the columns of one document."""
    document_separator: str | None
    """Between the documents of a text file; None: the file is one."""


class _Bad(Exception):
    """One row that is no document."""


def read_part(part: Part, how: How) -> Iterator[Found]:
    """The documents of a part. `UserError` naming the file if it is unreadable."""
    read = {".parquet": _read_parquet, ".txt": _read_text}.get(suffix(part.uri), _read_jsonl)
    try:
        yield from read(part, how)
    except (OSError, EOFError, pa.ArrowException) as error:
        reason = str(error).split("\n", 1)[0].strip() or type(error).__name__
        raise UserError(f"{part.uri}: cannot be read, it may be damaged ({reason})") from None


def suffix(uri: str) -> str:
    """Which of SUFFIXES a file has; '' for none of them."""
    return max((s for s in SUFFIXES if uri.endswith(s)), key=len, default="")


def split_file(file: storage.FileInfo, size: int) -> list[Part]:
    """Cut a file into parts of about `size` bytes where its format allows it."""
    kind = suffix(file.uri)
    if kind == ".parquet" and file.size > size // 8:  # it may be many times that once unpacked
        return _row_groups(file, size)
    if kind == ".jsonl" and file.size > size:
        starts = range(0, file.size, size)
        return [
            Part(file.uri, at, min(at + size, file.size), min(size, file.size - at))
            for at in starts
        ]
    return [Part(file.uri, 0, None, file.size)]


def _joined(row: Mapping[str, Any], how: How) -> str:
    texts = []
    for column in how.columns:
        if column not in row:
            raise _Bad(f"no column '{column}'{nearest(column, row)}, it has: {', '.join(row)[:80]}")
        value = row[column]
        if not isinstance(value, str | None):
            raise _Bad(f"column '{column}' holds {type(value).__name__}, not text")
        texts.append(value or "")
    return how.separator.join(text for text in texts if text)


def _found(place: str, text: Callable[[Any], str], raw: Any) -> Found:
    """The document that `text(raw)` is; a lone surrogate is no text that could be encoded."""
    try:
        value = text(raw)
        value.encode()
    except json.JSONDecodeError as error:
        return Found(place, None, f"not JSON: {error.msg}")
    except UnicodeError:
        return Found(place, None, "not valid UTF-8")
    except RecursionError:
        return Found(place, None, "not JSON: nested too deeply")
    except _Bad as error:
        return Found(place, None, str(error))
    return Found(place, value)


def _decoded(data: bytes) -> str:
    return data.decode().removeprefix("\ufeff")


# ------------------------------------------------------------------------------------------ jsonl


def _opened(uri: str) -> BinaryIO:
    """A file as buffered bytes, unpacked."""
    raw = storage.open_input(uri)
    for ending, codec in COMPRESSED.items():
        if uri.endswith(ending):
            return io.BufferedReader(pa.CompressedInputStream(raw, codec), _CHUNK)
    return raw


def _lines(file: BinaryIO, part: Part) -> Iterator[tuple[str, bytes]]:
    """Lines that begin within the part, and their places; the first part counts line numbers."""
    if part.start:
        file.seek(part.start - 1)
        file.readline()  # of the part before, even if only its newline
        position = file.tell()
    else:
        position = 0
    number = 0
    while part.stop is None or position < part.stop:
        line = file.readline()
        if not line:
            return
        number += 1
        yield f"{part.uri}{f' at byte {position}' if part.start else f':{number}'}", line
        position += len(line)


def _read_jsonl(part: Part, how: How) -> Iterator[Found]:
    with _opened(part.uri) as file:
        for place, line in _lines(file, part):
            if line.strip():
                yield _found(place, lambda line: _joined(_object(line), how), line)


def _object(line: bytes) -> Mapping[str, Any]:
    row = json.loads(_decoded(line))
    if not isinstance(row, dict):
        raise _Bad(f"not an object but {type(row).__name__}")
    return row


# ---------------------------------------------------------------------------------------- parquet


def _parquet(uri: str) -> pq.ParquetFile:
    return pq.ParquetFile(storage.open_input(uri))


def _row_groups(file: storage.FileInfo, size: int) -> list[Part]:
    try:
        with _parquet(file.uri) as parquet:
            groups = parquet.metadata.num_row_groups
            sizes = [parquet.metadata.row_group(k).total_byte_size for k in range(groups)]
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"{file.uri}: not a readable parquet file ({error})") from None
    parts: list[Part] = []
    start = 0
    for k in range(groups):
        if k + 1 == groups or sum(sizes[start : k + 2]) > size:
            parts.append(Part(file.uri, start, k + 1, sum(sizes[start : k + 1])))
            start = k + 1
    return parts


def _read_parquet(part: Part, how: How) -> Iterator[Found]:
    with _parquet(part.uri) as parquet:
        _check_columns(part.uri, parquet.schema_arrow, how.columns)
        groups = range(part.start, parquet.metadata.num_row_groups)[
            : None if part.stop is None else part.stop - part.start
        ]
        first = sum(parquet.metadata.row_group(k).num_rows for k in range(part.start))
        for batch in parquet.iter_batches(256, row_groups=list(groups), columns=list(how.columns)):
            for k in range(batch.num_rows):
                row = batch.slice(k, 1)
                yield _found(
                    f"{part.uri} row {first + k}", lambda row: _joined(_cells(row), how), row
                )
            first += batch.num_rows


def _cells(row: pa.RecordBatch) -> Mapping[str, Any]:
    """A batch of one row; text that is not UTF-8 raises here, for this row alone."""
    return {name: row.column(name)[0].as_py() for name in row.schema.names}


def _check_columns(uri: str, schema: pa.Schema, columns: Sequence[str]) -> None:
    for column in columns:
        if column not in schema.names:
            known = ", ".join(schema.names)
            raise UserError(
                f"{uri}: there is no column '{column}'{nearest(column, schema.names)}; "
                f"there are: {known}"
            )


# ------------------------------------------------------------------------------------------- text


def _read_text(part: Part, how: How) -> Iterator[Found]:
    with _opened(part.uri) as file:
        pieces = _pieces(file, how.document_separator)
        for number, piece in enumerate(pieces, start=1):
            place = part.uri if how.document_separator is None else f"{part.uri} document {number}"
            yield _found(place, _decoded, piece)


def _pieces(file: BinaryIO, separator: str | None) -> Iterator[bytes]:
    if separator is None:
        yield file.read()
        return
    mark, rest = separator.encode(), b""
    while chunk := file.read(_CHUNK):
        *whole, rest = (rest + chunk).split(mark)
        yield from whole
    if rest:
        yield rest

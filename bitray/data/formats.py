"""Reading rows out of files: parquet, jsonl (plain, gzip, zstd) and text, always streaming.

A reader yields `Found`: a document with its place, or the reason why there is none. How many bad
rows are too many is decided elsewhere. A file that cannot be read is `Unreadable`, and named.
"""

import io
import json
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from bitray import storage
from bitray.data.rows import BadRow, Found, Row, RowSettings
from bitray.settings import UserError, nearest

COMPRESSED = {".gz": "gzip", ".zst": "zstd"}
SUFFIXES = (
    ".parquet", ".jsonl", ".jsonl.gz", ".jsonl.zst", ".json", ".json.gz", ".json.zst", ".txt"
)  # fmt: skip
"""What the files of a source end in; `.json` is taken to be lines, as `.jsonl` is."""
UNPACKING = 4
"""Bytes of text in a byte of parquet, roughly: units are to be of similar work."""
_CHUNK = 1 << 20


class Part(NamedTuple):
    """A fixed range of one input: bytes of a file (to None, its end), or shards of a stream."""

    uri: str
    start: int
    stop: int | None
    size: int
    """Bytes of text, for balance only."""


def read_part(part: Part, rows: RowSettings, document_separator: str | None) -> Iterator[Found]:
    """The documents of a part. `Unreadable` if the file is, from somewhere on or at all."""
    try:
        match suffix(part.uri):
            case ".parquet":
                yield from _read_parquet(part, rows)
            case ".txt":
                yield from _read_text(part, rows, document_separator)
            case _:
                yield from _read_jsonl(part, rows)
    except (OSError, EOFError, pa.ArrowException) as error:
        reason = str(error).split("\n", 1)[0].strip() or type(error).__name__
        why = f"cannot be read, it may be damaged ({reason})"
        raise storage.Unreadable(part.uri, why) from None


def suffix(uri: str) -> str:
    """Which of SUFFIXES a file has; '' for none of them."""
    return max((s for s in SUFFIXES if uri.endswith(s)), key=len, default="")


def split_file(file: storage.FileInfo, size: int) -> list[Part]:
    """Cut a file into parts of about `size` bytes of text, where its format allows it.

    By its size alone: the files of a big corpus are not opened to plan the work on them.
    """
    weight = UNPACKING if suffix(file.uri) == ".parquet" else 1
    step = max(1, size // weight)
    if suffix(file.uri) not in (".parquet", ".jsonl", ".json") or file.size <= step:
        return [Part(file.uri, 0, None, weight * file.size)]
    return [
        Part(file.uri, at, min(at + step, file.size), weight * min(step, file.size - at))
        for at in range(0, file.size, step)
    ]


# ------------------------------------------------------------------------------------------ jsonl


def _opened(uri: str) -> io.BufferedReader:
    """A file as buffered bytes, unpacked."""
    raw = storage.open_input(uri)
    for ending, codec in COMPRESSED.items():
        if uri.endswith(ending):
            return io.BufferedReader(pa.CompressedInputStream(raw, codec), _CHUNK)
    return raw


def _lines(file: io.BufferedReader, part: Part) -> Iterator[tuple[str, bytes]]:
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


def _read_jsonl(part: Part, rows: RowSettings) -> Iterator[Found]:
    with _opened(part.uri) as file:
        for place, line in _lines(file, part):
            if line.strip():
                yield rows.found(place, partial(_object, line))


def _object(line: bytes) -> Row:
    row = json.loads(_decoded(line))
    if not isinstance(row, dict):
        raise BadRow(f"not an object but {type(row).__name__}")
    return row


def _decoded(data: bytes) -> str:
    return data.decode().removeprefix("\ufeff")


# ---------------------------------------------------------------------------------------- parquet


def _read_parquet(part: Part, rows: RowSettings) -> Iterator[Found]:
    with pq.ParquetFile(storage.open_input(part.uri)) as parquet:
        _check_columns(part.uri, parquet.schema_arrow, rows.needed)
        first = 0
        for group in range(parquet.metadata.num_row_groups):
            if _begins_in(part, parquet.metadata.row_group(group)):
                for k, row in enumerate(_group_rows(parquet, group, rows.needed), start=first):
                    yield rows.found(f"{part.uri} row {k}", partial(_cells, row))
            first += parquet.metadata.row_group(group).num_rows


def _begins_in(part: Part, group: pq.RowGroupMetaData) -> bool:
    """Whether a row group belongs to the part: to the one in which its first byte lies."""
    column = group.column(0)
    begin = column.dictionary_page_offset or column.data_page_offset
    return part.start <= begin and (part.stop is None or begin < part.stop)


def _group_rows(
    parquet: pq.ParquetFile, group: int, columns: list[str]
) -> Iterator[pa.RecordBatch]:
    """Batches of one row each."""
    for batch in parquet.iter_batches(256, row_groups=[group], columns=columns):
        for k in range(batch.num_rows):
            yield batch.slice(k, 1)


def _cells(row: pa.RecordBatch) -> Row:
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


def _read_text(part: Part, rows: RowSettings, separator: str | None) -> Iterator[Found]:
    """A text file has one column, `text`, whatever columns the other files have."""
    rows = rows.model_copy(update={"columns": ("text",)})
    with _opened(part.uri) as file:
        for number, piece in enumerate(_pieces(file, separator), start=1):
            place = part.uri if separator is None else f"{part.uri} document {number}"
            yield rows.found(place, partial(_one_cell, piece))


def _one_cell(piece: bytes) -> Row:
    return {"text": _decoded(piece)}


def _pieces(file: io.BufferedReader, separator: str | None) -> Iterator[bytes]:
    if separator is None:
        yield file.read()
        return
    mark, rest = separator.encode(), b""
    while chunk := file.read(_CHUNK):
        *whole, rest = (rest + chunk).split(mark)
        yield from whole
    if rest:
        yield rest

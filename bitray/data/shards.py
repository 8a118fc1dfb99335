"""Shards: packed rows in Arrow IPC files, written once, read at random by global row number.

Local shards are memory-mapped. Of remote ones the record batches (*row groups*) that are asked for
are fetched into a folder of this machine, which all its processes share, and mapped from there.
"""

import hashlib
import itertools
import os
import tempfile
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from jaxtyping import Int

from bitray import storage
from bitray.data.manifest import Manifest, Shard, SplitName, digest, read_manifest
from bitray.data.packing import PackedRows, Row
from bitray.retries import StorageGone
from bitray.settings import UserError

GROUP_TOKENS = 1 << 20
"""Tokens of a row group: 4 MB, what one request to an object store should be worth."""


def group_rows(length: int) -> int:
    """Rows of a row group."""
    return max(1, GROUP_TOKENS // length)


def _schema(length: int) -> pa.Schema:
    ids = pa.list_(pa.field("item", pa.int32(), nullable=False), length)
    counts = pa.list_(pa.field("item", pa.int32(), nullable=False))
    kinds = {"input_ids": ids, "lengths": counts, "prompts": counts}
    return pa.schema([pa.field(name, kind, nullable=False) for name, kind in kinds.items()])


class ShardWriter:
    """Collects the rows of one unit and split; `close` gives the bytes of the file."""

    def __init__(self, length: int) -> None:
        self.rows = 0
        self._schema = _schema(length)
        self._group: list[Row] = []
        self._group_rows = group_rows(length)
        self._sink = pa.BufferOutputStream()
        self._writer = pa.ipc.new_file(self._sink, self._schema)

    def add(self, rows: Iterable[Row]) -> None:
        """Append rows, in order."""
        for row in rows:
            self.rows += 1
            self._group.append(row)
            if len(self._group) == self._group_rows:
                self._write_group()

    def close(self) -> pa.Buffer:
        """The finished file. The same rows give the same bytes."""
        if self._group:
            self._write_group()
        self._writer.close()
        return self._sink.getvalue()

    def _write_group(self) -> None:
        ids = np.concatenate([row.input_ids for row in self._group])
        counts = [len(row.lengths) for row in self._group]
        offsets = pa.array(np.concatenate([[0], np.cumsum(counts)]).astype(np.int32))
        arrays = [pa.FixedSizeListArray.from_arrays(pa.array(ids), type=self._schema.field(0).type)]
        for found in ([row.lengths for row in self._group], [row.prompts for row in self._group]):
            values = pa.array(np.fromiter(itertools.chain(*found), np.int32))
            arrays.append(
                pa.ListArray.from_arrays(offsets, values, type=self._schema.field(1).type)
            )
        self._writer.write_batch(pa.record_batch(arrays, schema=self._schema))
        self._group = []


class _Group(NamedTuple):
    """A mapped row group."""

    input_ids: np.ndarray  # int32 [rows, length]
    offsets: np.ndarray  # int32 [rows + 1]
    lengths: np.ndarray  # int32 [documents]
    prompts: np.ndarray  # int32 [documents]


class Shards:
    """The prepared rows of every source and split."""

    def __init__(
        self,
        root_uri: str,
        manifest: Manifest,
        cache_dir: str | None = None,
        cache_bytes: int = 8 << 30,
    ) -> None:
        self.root_uri = root_uri
        self._shards: dict[tuple[str, str], tuple[Shard, ...]] = {}
        self._starts: dict[tuple[str, str], np.ndarray] = {}
        self._open(manifest)
        self._files: dict[str, pa.ipc.RecordBatchFileReader] = {}
        self._groups: OrderedDict[tuple[str, int], _Group] = OrderedDict()
        self._remote = storage.is_remote(root_uri)
        self._cache = Path(cache_dir or _cache_dir()) / digest([root_uri, manifest.identity()])[:16]
        group_bytes = 4 * manifest.group_rows * manifest.length
        self._most_groups = max(2, cache_bytes // group_bytes) if self._remote else 1 << 16

    def _reopen(self) -> None:
        """More may have been prepared in the meantime."""
        found = read_manifest(self.root_uri)
        assert found is not None and found.identity() == self.manifest.identity()
        self._open(found)

    def _open(self, manifest: Manifest) -> None:
        self.manifest = manifest
        for source, entry in manifest.sources.items():
            for split, counts in entry.splits.items():
                self._shards[source, split] = counts.shards
                ends = np.cumsum([0, *(shard.rows for shard in counts.shards)])
                self._starts[source, split] = ends

    def num_rows(self, source: str, split: SplitName = "train") -> int:
        """Rows of a source's split."""
        return self.manifest.num_rows(source, split)

    def read(
        self, source: str, split: SplitName, rows: Int[np.ndarray, " n"] | Sequence[int]
    ) -> PackedRows:
        """The rows with these global numbers, in this order."""
        wanted = np.asarray(rows, dtype=np.int64)
        if (
            wanted.size
            and wanted.max() >= self._starts[source, split][-1]
            and not self.manifest.done
        ):
            self._reopen()
        starts = self._starts[source, split]
        if wanted.size and (wanted.min() < 0 or wanted.max() >= starts[-1]):
            raise IndexError(f"{source}/{split} has {starts[-1]} rows; asked for {wanted.max()}")
        files = np.searchsorted(starts, wanted, side="right") - 1
        ids = np.empty((len(wanted), self.manifest.length), np.int32)
        lengths, prompts = [], []
        for k, (file, row) in enumerate(zip(files, wanted - starts[files], strict=True)):
            group, at = divmod(int(row), self.manifest.group_rows)
            found = self._group(self._shards[source, split][file], group)
            ids[k] = found.input_ids[at]
            documents = slice(found.offsets[at], found.offsets[at + 1])
            lengths.append(found.lengths[documents].tolist())
            prompts.append(found.prompts[documents].tolist())
        return PackedRows(ids, lengths, prompts)

    def verify(self, source: str, split: SplitName) -> None:
        """Hash the shards of a split against the manifest; `UserError` naming the first bad one."""
        for shard in self._shards[source, split]:
            self._verify(shard)

    def _verify(self, shard: Shard) -> None:
        try:
            with storage.open_input(storage.join(self.root_uri, shard.name)) as data:
                found = hashlib.file_digest(data, "sha256").hexdigest()
        except StorageGone:
            raise
        except UserError as error:
            raise self._damaged(shard.name, str(error)) from None
        if found != shard.sha256:
            raise self._damaged(shard.name, "its sha256 is not the manifest's")

    # --------------------------------------------------------------------------- row groups

    def _group(self, shard: Shard, index: int) -> _Group:
        key = (shard.name, index)
        if key in self._groups:
            self._groups.move_to_end(key)
            return self._groups[key]
        batch = self._fetched(shard, index) if self._remote else self._file(shard).get_batch(index)
        ids = batch.column(0).flatten().to_numpy().reshape(batch.num_rows, -1)
        lengths, prompts = batch.column(1), batch.column(2)
        group = _Group(
            ids, lengths.offsets.to_numpy(), lengths.values.to_numpy(), prompts.values.to_numpy()
        )
        self._groups[key] = group
        if len(self._groups) > self._most_groups:
            old, _ = self._groups.popitem(last=False)
            if self._remote:
                self._cached(*old).unlink(missing_ok=True)
        return group

    def _file(self, shard: Shard) -> pa.ipc.RecordBatchFileReader:
        """A shard, opened; at the first time its hash is checked."""
        name = shard.name
        if name not in self._files:
            self._verify(shard)
            uri = storage.join(self.root_uri, name)
            try:
                data = (
                    storage.open_input(uri)
                    if self._remote
                    else pa.memory_map(storage.local_path(uri))
                )
                self._files[name] = pa.ipc.open_file(data)
            except (OSError, pa.ArrowInvalid) as error:
                raise self._damaged(name, str(error)) from None
        return self._files[name]

    def _fetched(self, shard: Shard, index: int) -> pa.RecordBatch:
        """A remote row group, mapped from its copy on this machine."""
        path = self._cached(shard.name, index)
        try:
            return _mapped(path)
        except FileNotFoundError:
            batch = self._file(shard).get_batch(index)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}")
        with pa.OSFile(str(partial), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as out:
            out.write_batch(batch)
        mapped = _mapped(partial)  # before another process may find it, and evict it
        os.replace(partial, path)
        return mapped

    def _cached(self, name: str, index: int) -> Path:
        return self._cache / f"{name.replace('/', '__')}.{index}"

    def _damaged(self, name: str, why: str) -> UserError:
        return UserError(
            f"prepared shard {storage.join(self.root_uri, name)} is missing or damaged ({why}); "
            f"delete {self.root_uri} and prepare again"
        )


def _mapped(path: Path) -> pa.RecordBatch:
    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def _cache_dir() -> str:
    return os.path.join(tempfile.gettempdir(), f"bitray-rows-{os.getuid()}")


def held_out(
    shards: Shards, split: SplitName = "validation", max_rows: int | None = None
) -> dict[str, PackedRows]:
    """Per source its held-out rows.

    All of each source's opening, or `max_rows` evenly spread ones: the same ones while the rest is
    being prepared and after. Sources without a row there are left out.
    """
    found = {}
    for source, entry in shards.manifest.sources.items():
        rows = entry.opened(split).rows
        count = rows if max_rows is None else min(rows, max_rows)
        if count:
            found[source] = shards.read(source, split, np.arange(count) * rows // count)
    return found

"""Rows of datasets that only the `datasets` library can read: streamed, one shard after another."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import pyarrow as pa

from bitray import storage
from bitray.data.manifest import digest
from bitray.data.rows import Row
from bitray.settings import UserError, nearest


class Dataset(NamedTuple):
    """A dataset at a commit; a local folder with the layout of one has none."""

    path: str
    name: str | None
    split: str
    revision: str | None


def pinned(wanted: Dataset) -> tuple[Dataset, str]:
    """The dataset at the commit that its revision is now, and the identity of its content."""
    if storage.is_local_folder(wanted.path):
        path = storage.local_path(wanted.path)
        files = [list(file) for file in storage.list_files(path)]
        return wanted._replace(path=path, revision=None), digest(files)[:40]
    from bitray import hub

    commit = hub.commit(wanted.path, wanted.revision)
    return wanted._replace(revision=commit), commit


def shard_count(dataset: Dataset) -> int:
    """Shards that can be read apart from each other. `UserError` for what is not there."""
    return int(_stream(dataset).num_shards)


def shard_rows(dataset: Dataset, shard: int) -> Iterator[Row]:
    """The rows of one shard. `Unreadable` if it is, from somewhere on or at all."""
    stream = _stream(dataset)
    rows = iter(stream.shard(num_shards=stream.num_shards, index=shard))
    while True:
        try:
            row = next(rows, None)
        except _errors() as error:
            where = f"{dataset.path} shard {shard}"
            raise storage.Unreadable(where, f"cannot be read ({_reason(error)})") from None
        if row is None:
            return
        yield row


def _stream(dataset: Dataset) -> Any:
    import datasets

    path, name, split, revision = dataset
    try:
        known = datasets.get_dataset_config_names(path, revision=revision)
        if name is not None and name not in known:
            raise UserError(
                f"{path}: has no configuration '{name}'{nearest(name, known)}; "
                f"it has: {', '.join(known)}"
            )
        found = datasets.load_dataset(path, name, revision=revision, streaming=True)
    except _errors() as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: cannot be opened as a dataset ({_reason(error)})") from None
    if split not in found:
        raise UserError(
            f"{path}: has no split '{split}'{nearest(split, found)}; it has: {', '.join(found)}"
        )
    return found[split]


def _errors() -> tuple[type[Exception], ...]:
    from datasets.exceptions import DatasetsError

    return (OSError, ValueError, EOFError, DatasetsError, pa.ArrowException)


def _reason(error: Exception) -> str:
    return str(error).split("\n", 1)[0].strip() or type(error).__name__

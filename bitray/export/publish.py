"""Files and folders that appear under their name whole or not at all."""

import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bitray import storage
from bitray.scratch import Scratch
from bitray.settings import UserError


@contextmanager
def published_file(uri: str) -> Iterator[Path]:
    """A temporary path to write to; renamed (or uploaded) to `uri` if the block succeeds."""
    if storage.is_remote(uri):
        with Scratch() as folder:
            path = Path(folder) / uri.rsplit("/", 1)[-1]
            yield path
            storage.upload(str(path), uri)
        return
    target = Path(storage.local_path(uri))
    if target.is_dir():
        raise UserError(f"{uri}: a folder; name the file to write in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _beside(target)
    try:
        yield path
        with path.open("rb") as file:
            os.fsync(file.fileno())
        path.replace(target)
        storage.sync_folder(target.parent)
    finally:
        path.unlink(missing_ok=True)


@contextmanager
def published_folder(uri: str, marker: str) -> Iterator[Path]:
    """A temporary folder to fill; it becomes `uri` if the block succeeds.

    A folder already there is replaced if it holds `marker` or nothing, otherwise it is someone
    else's and a UserError.
    """
    occupied = storage.exists(uri) and storage.list_files(uri)
    if occupied and not storage.exists(storage.join(uri, marker)):
        raise UserError(f"{uri}: exists and holds no {marker}; name a new or empty folder")
    if storage.is_remote(uri):
        with Scratch() as folder:
            yield Path(folder)
            if storage.exists(uri):
                storage.remove(uri)
            storage.upload(folder, uri)
        return
    target = Path(storage.local_path(uri))
    target.parent.mkdir(parents=True, exist_ok=True)
    path = _beside(target)
    path.mkdir()
    try:
        yield path
        _swap(path, target)
    finally:
        shutil.rmtree(path, ignore_errors=True)


def _beside(target: Path) -> Path:
    return target.with_name(f".{target.name}.{secrets.token_hex(8)}.tmp")


def _swap(path: Path, target: Path) -> None:
    """Put the new folder in the old one's place, which is moved aside only for that moment."""
    old = _beside(target)
    if target.exists():
        target.rename(old)
    path.rename(target)
    storage.sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)

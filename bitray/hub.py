"""The Hugging Face Hub as a file system to read from: `datasets/OWNER/NAME[@REVISION]/path`.

A revision is resolved to a commit once, when files are listed; what is listed carries the commit,
so that whoever reads it later, wherever, reads the same bytes. `HF_ENDPOINT` names another Hub.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any
from urllib.parse import quote, unquote

from huggingface_hub import HfApi, HfFileSystem
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.hf_file_system import HfFileSystemFile
from pyarrow import fs as pafs

from bitray.settings import UserError

_PATH = re.compile(r"datasets/(?P<name>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?(?P<rest>/.*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_TIMEOUT = 20


def endpoint() -> str:
    """Address of the Hub."""
    return os.environ.get("HF_ENDPOINT") or "https://huggingface.co"


def filesystem() -> pafs.FileSystem:
    """The Hub for pyarrow; listings of a commit are asked for once per process."""
    return _filesystem(endpoint())


@lru_cache
def _filesystem(address: str) -> pafs.FileSystem:
    return pafs.PyFileSystem(_Handler(_Hub(endpoint=address)))


def pinned(path: str) -> str:
    """`datasets/...` with its commit instead of a branch, a tag or nothing. `UserError` if the
    Hub has no such dataset or revision, or cannot be asked."""
    found = _PATH.fullmatch(path)
    if found is None:
        raise UserError(f"hf://{path}: expected hf://datasets/OWNER/NAME[@REVISION]/path")
    revision = unquote(found["revision"]) if found["revision"] else None
    sha = commit(found["name"], revision)
    return f"datasets/{found['name']}@{sha}{(found['rest'] or '').rstrip('/')}"


def commit(name: str, revision: str | None) -> str:
    """The commit that a revision (by default the main branch) of a dataset is now."""
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    with _told(f"hf://datasets/{name}{f'@{quote(revision)}' if revision else ''}"):
        found = HfApi(endpoint=endpoint()).dataset_info(
            name, revision=revision, expand=["sha"], timeout=_TIMEOUT
        )
    assert found.sha is not None
    return found.sha


def identity(path: str) -> str:
    """Hash of a file's content, as the Hub's listing of its folder has it."""
    handler = filesystem().handler
    return str(handler.fs.info(path)["blob_id"])


class _Handler(pafs.FSSpecHandler):
    """What pyarrow asks; its problems in one sentence."""

    def get_file_info(self, paths: list[str]) -> list[pafs.FileInfo]:
        with _told(f"hf://{paths[0]}"):
            return super().get_file_info(paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> list[pafs.FileInfo]:
        with _told(f"hf://{selector.base_dir}"):
            return super().get_file_info_selector(selector)

    def open_input_file(self, path: str) -> Any:
        with _told(f"hf://{path}"):
            return super().open_input_file(path)


class _Hub(HfFileSystem):
    def _open(self, path: str, mode: str = "rb", **options: Any) -> "_File":  # type: ignore[override]
        assert mode == "rb", "the Hub is read here, never written"
        return _File(self, path, mode=mode, **options)


class _File(HfFileSystemFile):
    def _fetch_range(self, start: int, end: int) -> bytes:
        with _told(f"hf://{self.path}"):
            return super()._fetch_range(start, end)


@contextmanager
def _told(where: str) -> Iterator[None]:
    """The Hub's own errors are pages long, and not all of them are `OSError`."""
    try:
        yield
    except GatedRepoError:
        raise UserError(
            f"{where}: is gated; accept its conditions at {endpoint()} and set HF_TOKEN"
        ) from None
    except RevisionNotFoundError:
        raise UserError(f"{where}: the dataset has no such revision") from None
    except (RepositoryNotFoundError, HFValidationError):
        raise UserError(
            f"{where}: the Hub at {endpoint()} has no such dataset, or it is private and HF_TOKEN "
            "does not open it"
        ) from None
    except (HTTPError, OfflineModeIsEnabled) as error:
        if isinstance(error, FileNotFoundError):
            raise
        code = error.response.status_code if isinstance(error, HfHubHTTPError) else ""
        reason = f"{type(error).__name__} {code}".strip()
        raise UserError(
            f"{where}: the Hub at {endpoint()} cannot be reached or does not answer ({reason}); "
            "try again, or give a local copy as path"
        ) from None

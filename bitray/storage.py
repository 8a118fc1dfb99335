"""The one way to files, local or in object storage, over pyarrow.fs.

A URI is a local path, `file://...`, `s3://bucket/key`, `gs://bucket/key`, or, to read only,
`hf://datasets/OWNER/NAME[@REVISION]/path`; `AWS_ENDPOINT_URL` points at S3-compatible servers.
What appears under its final name is whole: a local write is a temporary file in the same folder,
fsync, rename, fsync of the folder; a remote object shows when it is closed. Calls to object storage
that fail are tried again (see `retries`).
"""

import hashlib
import io
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from pyarrow import fs as pafs

from bitray.object_store import RemoteFile, gs, s3
from bitray.retries import retried
from bitray.settings import UserError, nearest

SCHEMES = ("file", "s3", "gs", "hf")
_CHUNK = 8 << 20
_CONNECTIONS = 8
_SETTLE_S = 1.0
"""What two writers of the same remote object may lie apart and both still look whose it is."""
_WILD = re.compile(r"[*?\[]")
_TEMPORARY = re.compile(r"^\..*\.[0-9a-f]{16}\.tmp$")

T = TypeVar("T")


class Unreadable(UserError):
    """A file, or a part of a dataset, that is not there or damaged."""

    def __init__(self, where: str, why: str) -> None:
        super().__init__(where, why)
        self.where = where

    def __str__(self) -> str:
        return ": ".join(self.args)


class FileInfo(NamedTuple):
    """A file: `identity` changes when its content is written anew."""

    uri: str
    size: int
    identity: str


# ------------------------------------------------------------------------------------------ where


def is_remote(uri: str) -> bool:
    """Whether `uri` is in object storage rather than on a mounted file system."""
    return _split(uri)[0] != "file"


def absolute(uri: str) -> str:
    """`uri` as listings name it: an absolute local path, or `scheme://bucket/key`."""
    scheme, path = _split(uri)
    return path if scheme == "file" else f"{scheme}://{path}"


def local_path(uri: str) -> str:
    """The absolute path of a local URI."""
    assert not is_remote(uri), f"{uri} is not local"
    return absolute(uri)


def is_local_folder(uri: str) -> bool:
    """Whether `uri` is a folder of this machine."""
    return not is_remote(uri) and os.path.isdir(local_path(uri))


def join(uri: str, *parts: str) -> str:
    """`uri` with `parts` below it."""
    below = [part.strip("/") for part in parts if part.strip("/")]
    return "/".join([uri.rstrip("/") if below else uri, *below])


def exists(uri: str) -> bool:
    """Whether there is a file or a folder; a remote folder exists as long as it holds something."""
    return _about(uri).type != pafs.FileType.NotFound


def info(uri: str) -> FileInfo | None:
    """Size and identity of one file; None where there is no file of that name."""
    found = _about(uri)
    return _describe(uri, found) if found.type == pafs.FileType.File else None


def list_files(uri_or_glob: str, suffixes: Sequence[str] = ()) -> list[FileInfo]:
    """All files of a folder tree, or that a glob matches, sorted by URI; one file is a list of one.

    In a glob `*` stays within a name and `**` spans folders; a folder that matches stands for all
    files in it.
    Raises `UserError` where nothing of that name exists. Unfinished writes are not listed.
    """
    here = _about(uri_or_glob)
    if here.type == pafs.FileType.File:
        found = [here]
    elif here.type == pafs.FileType.Directory:
        found = _below(uri_or_glob, recursive=True)
    elif _WILD.search(here.path):
        found = _asked(uri_or_glob, lambda fs, path: _glob(fs, uri_or_glob, path))
    else:
        raise _missing(uri_or_glob)
    files = [
        _describe(uri_or_glob, one)
        for one in found
        if one.type == pafs.FileType.File and not _TEMPORARY.match(one.base_name)
    ]
    return sorted(one for one in files if not suffixes or one.uri.endswith(tuple(suffixes)))


def list_dirs(uri: str) -> list[str]:
    """The folders directly below `uri`, sorted; none where `uri` does not exist."""
    names = [one.base_name for one in _below(uri) if one.type == pafs.FileType.Directory]
    return [join(uri, name) for name in sorted(names)]


# ---------------------------------------------------------------------------------------- reading


def open_input(uri: str) -> io.BufferedReader:
    """A seekable binary file; remote ones are read ahead in big pieces."""
    filesystem, path = located(uri)
    try:
        if isinstance(filesystem, pafs.LocalFileSystem):
            return open(path, "rb")
        opened = _asked(uri, lambda fs, path: fs.open_input_file(path))
        return io.BufferedReader(RemoteFile(uri, opened, _CHUNK), _CHUNK)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise _missing(uri) from None


def read_bytes(uri: str) -> bytes:
    """The whole content of a file."""
    with open_input(uri) as source:
        return source.read()


def read_text(uri: str) -> str:
    """The whole content of a UTF-8 file."""
    try:
        return read_bytes(uri).decode()
    except UnicodeDecodeError as error:
        raise UserError(f"{uri}: not UTF-8 text (byte {error.start})") from None


def read_json(uri: str) -> Any:
    """The value that a JSON file holds."""
    try:
        return json.loads(read_text(uri))
    except json.JSONDecodeError as error:
        raise UserError(f"{uri}, line {error.lineno}: not JSON: {error.msg}") from None


def read_json_lines(uri: str) -> list[Any]:
    """The value of each line of a file; of a last one without an end, which is still being written
    or was cut off by a crash, none."""
    found = []
    for number, line in enumerate(read_text(uri).rpartition("\n")[0].splitlines(), 1):
        try:
            found.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise UserError(f"{uri}, line {number}: not JSON: {error.msg}") from None
    return found


def fetch(uri: str, cache_dir: str) -> str:
    """A local path with the content of `uri`: itself where local, else a copy in `cache_dir`.

    The copy is made once per content and shared by all processes that name the same cache.
    """
    if not is_remote(uri):
        return local_path(uri)
    found = info(uri)
    if found is None:
        raise _missing(uri)
    key = hashlib.sha256(f"{uri} {found.identity}".encode()).hexdigest()[:16]
    target = join(local_path(cache_dir), key, uri.rpartition("/")[2])
    if not exists(target):
        _copy_file(found, target)
    return target


# ---------------------------------------------------------------------------------------- writing


def write_bytes(uri: str, data: bytes) -> None:
    """Write a file whole or not at all, with the folders above it."""
    _store(io.BytesIO(data), uri)


def create(uri: str, data: bytes) -> bool:
    """Write a file unless there is one of that name; whether it is ours now.

    Locally a matter of one atomic link. Of a remote object the last writer stays, so after a moment
    we look whether it is still ours: two that begin within that moment are told apart, and one that
    lost longer than that between looking and writing takes the name from who thought to have it.
    """
    filesystem, path = located(_writable(uri))
    if isinstance(filesystem, pafs.LocalFileSystem):
        return _link(Path(path), data)
    if exists(uri):
        return False
    write_bytes(uri, data)
    time.sleep(_SETTLE_S)
    return read_bytes(uri) == data


def write_text(uri: str, text: str) -> None:
    """Write a UTF-8 file whole or not at all."""
    write_bytes(uri, text.encode())


def write_json(uri: str, value: Any) -> None:
    """Write a JSON file whole or not at all."""
    write_text(uri, json.dumps(value, indent=1) + "\n")


def upload(local: str, uri: str) -> None:
    """Copy a local file or folder tree to `uri`, file by file."""
    _copy_tree(local, uri)


def download_tree(uri: str, local: str) -> None:
    """Copy a file or folder tree to the local path `local`, file by file."""
    _copy_tree(uri, local)


def remove(uri: str) -> None:
    """Remove a file or a whole folder; what is not there is no error."""
    filesystem, path = located(_writable(uri))
    if path.strip("/").count("/") < 1:
        raise UserError(f"{uri}: refusing to remove a whole bucket or a folder of the root")
    if isinstance(filesystem, pafs.LocalFileSystem):
        _remove_local(Path(path))
        return
    match _about(uri).type:
        case pafs.FileType.File:
            _asked(uri, lambda fs, path: fs.delete_file(path))
        case pafs.FileType.Directory:
            _asked(uri, lambda fs, path: fs.delete_dir(path))


def sync_folder(path: str | Path) -> None:
    """Make the names in a local folder durable: fsync of a file does not cover its name."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# ------------------------------------------------------------------------------------- inner parts


def _split(uri: str) -> tuple[str, str]:
    """Scheme and path as pyarrow wants it: absolute, or `bucket/key`."""
    scheme, separator, rest = uri.partition("://")
    if not separator:
        return "file", os.path.abspath(os.path.expanduser(uri))
    if scheme not in SCHEMES:
        known = ", ".join(f"{name}://" for name in SCHEMES)
        raise UserError(
            f"{uri}: '{scheme}' is no kind of storage{nearest(scheme, SCHEMES)}; "
            f"there are local paths, {known}"
        )
    if scheme == "file":
        return scheme, os.path.abspath(f"/{rest}")
    if not rest.strip("/"):
        raise UserError(f"{uri}: names no bucket; expected {scheme}://bucket/path")
    return scheme, rest.strip("/")


def _writable(uri: str) -> str:
    if _split(uri)[0] == "hf":
        raise UserError(f"{uri}: the Hub is only read from; give a local path, s3:// or gs://")
    return uri


def located(uri: str) -> tuple[pafs.FileSystem, str]:
    """The file system of a URI, and the path in it."""
    scheme, path = _split(uri)
    match scheme:
        case "hf":
            from bitray import hub

            return hub.filesystem(), hub.pinned(path)
        case "s3":
            region = os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
            return s3(path.split("/")[0], os.environ.get("AWS_ENDPOINT_URL"), region), path
        case "gs":
            return gs(), path
        case _:
            return pafs.LocalFileSystem(), path


def _asked(uri: str, call: Callable[[pafs.FileSystem, str], T]) -> T:
    """What the file system of `uri` answers; object storage is asked again where it fails."""
    filesystem, path = located(uri)
    if isinstance(filesystem, pafs.S3FileSystem | pafs.GcsFileSystem):
        return retried(uri, lambda: call(filesystem, path))
    return call(filesystem, path)


def _about(uri: str) -> pafs.FileInfo:
    return _asked(uri, lambda fs, path: fs.get_file_info(path))


def _below(uri: str, recursive: bool = False) -> list[pafs.FileInfo]:
    def listed(filesystem: pafs.FileSystem, path: str) -> list[pafs.FileInfo]:
        wanted = pafs.FileSelector(path, allow_not_found=True, recursive=recursive)
        return filesystem.get_file_info(wanted)

    return _asked(uri, listed)


def _describe(uri: str, found: pafs.FileInfo) -> FileInfo:
    scheme = _split(uri)[0]
    name = found.path if scheme == "file" else f"{scheme}://{found.path}"
    if scheme == "hf":
        from bitray import hub

        return FileInfo(name, found.size, hub.identity(found.path))
    return FileInfo(name, found.size, f"{found.mtime_ns}-{found.size}")


def _glob(filesystem: pafs.FileSystem, uri: str, path: str) -> list[pafs.FileInfo]:
    """What lies below the last folder that is named without a wildcard, and matches."""
    base = path[: _WILD.search(path).start()].rpartition("/")[0]  # type: ignore[union-attr]
    if filesystem.get_file_info(base or "/").type != pafs.FileType.Directory:
        raise _missing(uri)
    pattern = path[len(base) :].strip("/").split("/")
    below = filesystem.get_file_info(pafs.FileSelector(base or "/", recursive=True))
    found = [one for one in below if _matches(one.path[len(base) :].strip("/").split("/"), pattern)]
    if not found:
        raise UserError(f"{uri}: nothing in {base} matches '{'/'.join(pattern)}'")
    return found


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return True  # below a folder that matches
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts)))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _missing(uri: str) -> Unreadable:
    """The sentence for a path that is not there: the first part that fails, and what is like it."""
    filesystem, path = located(uri)
    if filesystem.get_file_info(path).type == pafs.FileType.Directory:
        return Unreadable(uri, "is a folder, where a file is wanted")
    parent, _, name = path.rpartition("/")
    while parent and filesystem.get_file_info(parent).type != pafs.FileType.Directory:
        parent, _, name = parent.rpartition("/")
    if not parent and is_remote(uri):
        return Unreadable(uri, f"there is no bucket '{name}', or it may not be read")
    below = filesystem.get_file_info(pafs.FileSelector(parent or "/"))
    hint = nearest(name, [one.base_name for one in below])
    return Unreadable(uri, f"no such file or folder; {parent or '/'} has no '{name}'{hint}")


def _store(source: io.BufferedIOBase, uri: str) -> None:
    filesystem, path = located(_writable(uri))
    if isinstance(filesystem, pafs.LocalFileSystem):
        with _temporary(Path(path), source) as temporary:
            os.replace(temporary, path)
        return

    def put(filesystem: pafs.FileSystem, path: str) -> None:
        source.seek(0)
        # By default pyarrow compresses what is called `.gz` or `.zst`, a second time.
        with filesystem.open_output_stream(path, compression=None) as sink:
            shutil.copyfileobj(source, sink, _CHUNK)

    _asked(uri, put)


def _link(path: Path, data: bytes) -> bool:
    with _temporary(path, io.BytesIO(data)) as temporary:
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        finally:
            temporary.unlink()
    return True


@contextmanager
def _temporary(path: Path, source: io.BufferedIOBase) -> Iterator[Path]:
    """A durable file beside `path` with the content of `source`, which is to become `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        with open(temporary, "xb") as sink:
            shutil.copyfileobj(source, sink, _CHUNK)
            sink.flush()
            os.fsync(sink.fileno())
        yield temporary
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def _copy_tree(source: str, target: str) -> None:
    files = list_files(source)
    root = absolute(source)
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        for _ in pool.map(lambda one: _copy_file(one, join(target, one.uri[len(root) :])), files):
            pass


def _copy_file(source: FileInfo, target: str) -> None:
    with open_input(source.uri) as content:
        _store(content, target)
    written = info(target)
    if written is None or written.size != source.size:
        size = "nothing" if written is None else f"{written.size} bytes"
        raise OSError(f"{target}: {size} arrived of the {source.size} bytes of {source.uri}")


def _remove_local(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink(missing_ok=True)
    elif path.is_dir():
        shutil.rmtree(path)
    else:
        return
    sync_folder(path.parent)

"""Clients of object storage, and its files as Python reads files; who uses them is `storage`."""

import io
import os
from functools import lru_cache
from typing import Any
from urllib.parse import urlsplit

from pyarrow import fs as pafs

from bitray.retries import retried


@lru_cache
def s3(bucket: str, endpoint: str | None, region: str | None) -> pafs.FileSystem:
    """Of S3, or of a server that speaks like it. It tries again what fails, a few times and each
    request by itself, before `retries` does so with whole calls."""
    options: dict[str, Any] = {
        "connect_timeout": 10,
        "request_timeout": 60,
        "allow_delayed_open": True,  # a small object is one request instead of three
        "retry_strategy": pafs.AwsStandardS3RetryStrategy(max_attempts=5),
    }
    if endpoint:
        server = urlsplit(endpoint if "://" in endpoint else f"https://{endpoint}")
        options |= {"endpoint_override": server.netloc, "scheme": server.scheme}
        region = region or "us-east-1"
    return pafs.S3FileSystem(region=region or pafs.resolve_s3_region(bucket), **options)


@lru_cache
def gs() -> pafs.FileSystem:
    """Of Google Cloud Storage."""
    return pafs.GcsFileSystem()


class RemoteFile(io.RawIOBase):
    """A remote file whose reads are tried again; every read names its place, so none depends on
    the one before."""

    def __init__(self, uri: str, file: Any, chunk: int) -> None:
        self._uri, self._file, self._chunk, self._at = uri, file, chunk, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._at}.get(whence)
        self._at = offset + (self._file.size() if base is None else base)
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), max(0, self._file.size() - self._at))
        found = retried(self._uri, lambda: self._file.read_at(count, self._at)) if count else b""
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)

    def readall(self) -> bytes:
        return b"".join(
            iter(lambda: self.read(self._chunk) or b"", b"")
        )  # by default 8 kB at a time

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()


class Patient(pafs.FileSystemHandler):
    """Tries the calls of another file system again, for libraries that bring no patience of their
    own: `PyFileSystem(Patient(filesystem))`."""

    def __init__(self, filesystem: pafs.FileSystem) -> None:
        self.filesystem = filesystem

    def _again(self, name: str, *args: Any) -> Any:
        call = getattr(self.filesystem, name)
        return retried(f"{self.get_type_name()}://{args[0]}", lambda: call(*args))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Patient) and self.filesystem == other.filesystem

    def __hash__(self) -> int:
        return hash(self.get_type_name())

    def get_type_name(self) -> str:
        return str(self.filesystem.type_name)

    def normalize_path(self, path: str) -> str:
        return str(self.filesystem.normalize_path(path))

    def get_file_info(self, paths: list[str]) -> Any:
        return self._again("get_file_info", paths)

    def get_file_info_selector(self, selector: pafs.FileSelector) -> Any:
        return self._again("get_file_info", selector)

    def create_dir(self, path: str, recursive: bool) -> None:
        call = self.filesystem.create_dir
        retried(path, lambda: call(path, recursive=recursive))

    def delete_dir(self, path: str) -> None:
        self._again("delete_dir", path)

    def delete_dir_contents(self, path: str, missing_dir_ok: bool = False) -> None:
        call = self.filesystem.delete_dir_contents
        retried(path, lambda: call(path, missing_dir_ok=missing_dir_ok))

    def delete_root_dir_contents(self) -> None:
        raise NotImplementedError("a whole bucket is never removed")

    def delete_file(self, path: str) -> None:
        self._again("delete_file", path)

    def move(self, src: str, dest: str) -> None:
        self._again("move", src, dest)

    def copy_file(self, src: str, dest: str) -> None:
        self._again("copy_file", src, dest)

    def open_input_stream(self, path: str) -> Any:
        return self._again("open_input_stream", path)

    def open_input_file(self, path: str) -> Any:
        return self._again("open_input_file", path)

    def open_output_stream(self, path: str, metadata: Any) -> Any:
        call = self.filesystem.open_output_stream
        return retried(path, lambda: call(path, compression=None, metadata=metadata))

    def open_append_stream(self, path: str, metadata: Any) -> Any:
        call = self.filesystem.open_append_stream
        return retried(path, lambda: call(path, compression=None, metadata=metadata))

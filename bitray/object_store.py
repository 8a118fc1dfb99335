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

"""Faults of a machine, planned: a process that ends, or a disk that fails, at a given change to the
file system. Changes are fsync, rename, link, unlink, mkdir, rmdir, opening a file to write, and
every write to it.
"""

import builtins
import errno
import io
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

CHANGES = ("fsync", "replace", "rename", "link", "unlink", "mkdir", "rmdir")
Fate = Callable[[str], str]
"""What befalls a change: "" nothing, "exit", "error", "delay", or (of a write) "short"."""


class _File:
    """A file opened to write, whose writes have a fate."""

    def __init__(self, file: Any, fate: Fate) -> None:
        self._file, self._fate = file, fate

    def write(self, data: Any) -> int:
        if befallen(self._fate("write")):
            self._file.write(data[: len(data) // 2])
            self._file.flush()
            raise OSError(errno.ENOSPC, "No space left on device")
        return int(self._file.write(data))

    def __enter__(self) -> "_File":
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def __iter__(self) -> Iterator[Any]:
        return iter(self._file)


def befallen(fate: str) -> bool:
    """Let a fate happen; True if half of a write is still to be done."""
    match fate:
        case "exit":
            os._exit(9)
        case "error":
            raise OSError(errno.EIO, "Input/output error")
        case "delay":
            time.sleep(0.01)
    return fate == "short"


def undisturbed(fate: str) -> None:
    """What cannot be done by half is not done."""
    if befallen(fate):
        raise OSError(errno.ENOSPC, "No space left on device")


@contextmanager
def faulty(fate: Fate) -> Iterator[None]:
    """Inside, every change of this process to the file system asks for its fate."""
    before = {name: getattr(os, name) for name in CHANGES}
    opened, io_opened = builtins.open, io.open

    def patched(name: str) -> Callable[..., Any]:
        def change(*args: Any, **kwargs: Any) -> Any:
            undisturbed(fate(name))
            return before[name](*args, **kwargs)

        return change

    def patched_open(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if mode in ("r", "rb") or isinstance(file, int):
            return opened(file, mode, *args, **kwargs)
        undisturbed(fate("open"))
        return _File(opened(file, mode, *args, **kwargs), fate)

    for name in CHANGES:
        setattr(os, name, patched(name))
    builtins.open = io.open = patched_open  # type: ignore[assignment]
    try:
        yield
    finally:
        for name, change in before.items():
            setattr(os, name, change)
        builtins.open, io.open = opened, io_opened


def exit_at(call: int) -> Fate:
    """The process ends, as by a kill, at its `call`-th change."""
    left = [call]

    def fate(_: str) -> str:
        left[0] -= 1
        return "exit" if left[0] == 0 else ""

    return fate


def by_seed(seed: int, rate: float) -> Fate:
    """A share of changes fails, is late or is done by half."""
    chance = random.Random(seed)
    return lambda _: chance.choice(["error", "delay", "short"]) if chance.random() < rate else ""


def finished(work: Callable[[], Any], crash_at: int) -> bool:
    """Whether `work` came to its end in a process that dies at a given change."""
    child = os.fork()
    if child == 0:
        try:
            with faulty(exit_at(crash_at)):
                work()
            os._exit(0)
        finally:
            os._exit(1)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, 9), "the child failed in another way"
    return status == 0

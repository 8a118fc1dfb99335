"""Temporary folders of which nothing stays: they go when they have been used, and what a killed
process left goes when anyone makes another one on the machine."""

import fcntl
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


class Scratch:
    """An empty folder for this process; `with` gives its path and removes it, as does `close`, or
    the end of the object or of the process. The system lets go of the lock that says it is in use
    even when the process is killed, so whose lock can be had is nobody's.
    """

    def __init__(self) -> None:
        root = scratch_root()
        root.mkdir(mode=0o700, exist_ok=True)
        with (root / "lock").open("w") as making:
            fcntl.flock(making, fcntl.LOCK_EX)  # or a folder could go before its lock is held
            _sweep(root)
            own = Path(tempfile.mkdtemp(dir=root))
            held = (own / "lock").open("w")
            fcntl.flock(held, fcntl.LOCK_EX)
        (own / "files").mkdir()
        self.path = str(own / "files")
        self.close = weakref.finalize(self, _remove, own, held)

    def __enter__(self) -> str:
        return self.path

    def __exit__(self, *_: object) -> None:
        self.close()


def scratch_root() -> Path:
    """Where this user's folders lie."""
    return Path(tempfile.gettempdir(), f"bitray-{os.getuid()}")


def _remove(own: Path, held: IO[str]) -> None:
    """What is large first: what is left when this is cut short still has its lock, or is empty."""
    shutil.rmtree(own / "files", ignore_errors=True)
    shutil.rmtree(own, ignore_errors=True)
    held.close()


def _sweep(root: Path) -> None:
    """Remove what belongs to nobody any more."""
    for own in root.iterdir():
        if own.is_dir():
            with suppress(OSError), _unowned(own):
                shutil.rmtree(own, ignore_errors=True)


@contextmanager
def _unowned(own: Path) -> Iterator[None]:
    """With the lock of a folder, if it has one; BlockingIOError: somebody else has it."""
    if not (own / "lock").exists():
        yield
        return
    with (own / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield

"""One writer per run: a lease in the run's folder, with a heartbeat and a fencing epoch.

    lease/000003.json  000003.beat  000003.released

Every holder makes the file of the next epoch, which only one can (`storage.create`), so who holds
the lease is the highest number, and a holder is overtaken for good once there is a higher one.
Whoever writes for a run (checkpoints, journal) looks right before whether its epoch still counts,
and writes the epoch beside the content: between looking and writing remains a moment, in which an
overtaken writer may still finish; the epochs tell afterwards, which is what auditors look at.
"""

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitray import storage
from bitray.retries import patient
from bitray.settings import Passing, UserError

FOLDER = "lease"
BEAT_S = 5.0
STALE_S = 30.0
"""Age of the last heartbeat from which on a holder counts as lost."""


class Held(Passing):
    """Another driver holds the run, or one did that has not been gone for long."""


class TakenOver(Passing):
    """Another driver has taken the run over; nothing more may be written for this one."""


@dataclass(frozen=True)
class Claim:
    """An epoch of a run, as its workers and actors carry it."""

    run_dir: str
    epoch: int
    holder: str
    """Of this very claim: two claims of one epoch differ in it."""

    @property
    def uri(self) -> str:
        """The file of this epoch."""
        return _file(self.run_dir, self.epoch)

    def check(self) -> None:
        """`TakenOver` unless this is the newest epoch, and ours."""
        newest = newest_epoch(self.run_dir)
        held = storage.read_json(_file(self.run_dir, newest)) if newest else {}
        if newest == self.epoch and held.get("holder") == self.holder:
            return
        who = f"taken over by {_who(held)}, epoch {newest}" if held else "deleted"
        raise TakenOver(
            f"{self.run_dir}: the run was {who}; what epoch {self.epoch} still had to write is "
            "refused"
        )

    def beat(self) -> None:
        """Say that the holder lives."""
        storage.write_json(_beat(self.run_dir, self.epoch), {"time": time.time()})

    def release(self) -> None:
        """Say that the holder has ended in good order; in a file of its own, which no heartbeat
        that is still on its way can undo."""
        storage.write_json(_released(self.run_dir, self.epoch), {"time": time.time()})


def newest_epoch(run_dir: str) -> int:
    """The number of the newest lease of a run; 0 if there was none."""
    folder = storage.join(run_dir, FOLDER)
    if not storage.exists(folder):
        return 0
    names = [one.uri.rpartition("/")[2] for one in storage.list_files(folder, (".json",))]
    return max((int(name.removesuffix(".json")) for name in names), default=0)


def acquire(run_dir: str, now: Callable[[], float] = time.time) -> Claim:
    """The lease of a run, of the next epoch. `Held` while somebody else holds it, with who and
    how long ago he was heard of."""
    newest = newest_epoch(run_dir)
    if newest and (reason := _held(run_dir, newest, now())):
        raise Held(
            f"{run_dir}: is being written by {reason}; wait for it, stop it, or take another "
            "experiment=NAME"
        )
    me = {**_process(), "holder": os.urandom(8).hex(), "time": now()}
    claim = Claim(run_dir, newest + 1, str(me["holder"]))
    if not storage.create(claim.uri, (json.dumps(me) + "\n").encode()):
        raise Held(f"{run_dir}: another driver has just begun to write it; see who it is")
    return claim


def released(run_dir: str, epoch: int) -> bool:
    """Whether the holder of an epoch has ended in good order; False of one that was killed."""
    return storage.exists(_released(run_dir, epoch))


@contextmanager
def held(run_dir: str) -> Iterator[Claim]:
    """Inside, the lease is held, and a thread beats for it. It is released in the end, and also
    when its holder fails; after a kill it is taken over."""
    claim, over = acquire(run_dir), threading.Event()

    def beat() -> None:
        while not over.wait(BEAT_S):
            with suppress(OSError, UserError):  # without storage it grows stale
                claim.beat()

    claim.beat()
    thread = threading.Thread(target=beat, name="lease", daemon=True)
    thread.start()
    try:
        yield claim
    finally:
        over.set()
        with suppress(OSError, UserError), patient(BEAT_S):  # without storage it grows stale
            claim.release()


# ------------------------------------------------------------------------------------- inner parts


def _file(run_dir: str, epoch: int) -> str:
    return storage.join(run_dir, FOLDER, f"{epoch:06d}.json")


def _beat(run_dir: str, epoch: int) -> str:
    return storage.join(run_dir, FOLDER, f"{epoch:06d}.beat")


def _released(run_dir: str, epoch: int) -> str:
    return storage.join(run_dir, FOLDER, f"{epoch:06d}.released")


def _held(run_dir: str, epoch: int, now: float) -> str | None:
    """Who holds an epoch, in words; None if it is released, stale, or its process is no more."""
    if released(run_dir, epoch):
        return None
    holder = storage.read_json(_file(run_dir, epoch))
    heard, uri = holder, _beat(run_dir, epoch)
    if storage.exists(uri):
        heard = storage.read_json(uri)
    age = now - heard["time"]
    if age > STALE_S or _dead(holder):
        return None
    return f"{_who(holder)}, whose last heartbeat is {age:.0f} s old"


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {holder.get('host')}"


def _process() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid(), **_identity(os.getpid())}


def _identity(pid: int) -> dict[str, Any]:
    """What tells a process from a later one of the same number, and this machine, as far as
    process numbers mean the same on it, from others; empty where /proc does not say."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
        return {"machine": f"{boot} {os.readlink('/proc/self/ns/pid')}", "began": began}
    except OSError:
        return {}


def _dead(holder: dict[str, Any]) -> bool:
    """Whether the holder was a process of this machine that is gone."""
    here = _identity(os.getpid())
    if not here or holder.get("machine") != here["machine"]:
        return False
    return _identity(holder["pid"]).get("began") != holder["began"]

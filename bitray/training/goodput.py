"""Where the time of a run goes: every second of it belongs to exactly one cause.

The first worker's clock is switched from cause to cause, and a small file in the run's folder takes
its sums over restarts. Time in which nobody ran (between a stop and the same command) is not in it.
"""

import functools
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

from bitray import storage
from bitray.training.metrics import Metrics

T = TypeVar("T")
FILE = "goodput.json"
PRODUCTIVE, LOST = "productive", "lost_steps"
TRAINING = (PRODUCTIVE, "data_wait", "influence")
"""What steps take, and what decides what they learn from."""
CAUSES = (
    PRODUCTIVE, "start", "restart", LOST, "data_wait", "checkpoint", "evaluation", "influence",
    "other",
)  # fmt: skip
"""`start` ends with the first step of a stage; `restart` is a gap between the last sign of life of
failed workers and the next ones; lost steps were productive until they had to be taken again."""


class Clock:
    """Seconds by cause. All time since its making is in their sum."""

    def __init__(self, cause: str = "start", now: Callable[[], float] = time.time) -> None:
        self.seconds = dict.fromkeys(CAUSES, 0.0)
        self.unsaved = 0.0
        """Productive seconds since the last checkpoint: what a failure would cost."""
        self.last: dict[str, float] = {}
        """How long each cause lasted when it was the last time."""
        self._now, self._since, self._cause = now, now(), cause
        self._lock = threading.Lock()  # checkpoints end in a thread of their own

    def switch(self, cause: str) -> str:
        """From now on it is `cause`; what it was."""
        self.settle()
        before, self._cause = self._cause, cause
        return before

    @contextmanager
    def during(self, cause: str) -> Iterator[None]:
        """Inside it is `cause`, then again what it was."""
        before, began = self.switch(cause), self._now()
        try:
            yield
        finally:
            self.switch(before)
            self.last[cause] = self._now() - began

    def settle(self) -> float:
        """Give the time so far to its cause; the time up to which that is done."""
        with self._lock:
            now = self._now()
            seconds = max(0.0, now - self._since)  # clocks are set back at times
            self.seconds[self._cause] += seconds
            self.unsaved += seconds * (self._cause == PRODUCTIVE)
            self._since = now
        return now

    def saved(self, seconds: float) -> None:
        """A failure would cost so much less: a checkpoint holds them."""
        with self._lock:
            self.unsaved -= seconds

    def restore(self, held: Mapping[str, Any], began: float) -> None:
        """Go on from what a file holds; the gap since then was a restart where workers have run
        since the driver began, else its start. What they had not saved is lost."""
        self.seconds = dict.fromkeys(CAUSES, 0.0) | held["seconds"]
        self.seconds[PRODUCTIVE] -= held["unsaved"]
        self.seconds[LOST] += held["unsaved"]
        self.seconds["restart" if held["running"] else "start"] += max(0.0, began - held["until"])

    def training(self) -> float:
        """Seconds of training so far, without start-up, evaluation and checkpoints."""
        self.settle()
        return sum(self.seconds[cause] for cause in TRAINING)

    def shares(self) -> dict[str, float]:
        """Share of each cause; they sum to 1."""
        self.settle()
        total = sum(self.seconds.values())
        return {cause: seconds / total for cause, seconds in self.seconds.items()} if total else {}


class Ledger:
    """Keeps a clock's sums in the run's folder; a sink, for its rhythm is that of metrics."""

    def __init__(self, run_dir: str, clock: Clock) -> None:
        self.uri, self.clock = storage.join(run_dir, FILE), clock
        self.step: int | None = None
        self.saved: int | None = None
        began = clock.settle()
        if held := read(run_dir):
            clock.restore(held, began)
        self._keep()

    def metrics(self, save_every: int) -> dict[str, float]:
        """Of the run so far: shares of the causes, and how checkpoints are getting on."""
        missed = ((self.step or 0) - (self.saved or 0)) // save_every
        shares = {f"goodput/share_{name}": part for name, part in self.clock.shares().items()}
        took = self.clock.last.get("checkpoint")
        told = {} if took is None else {"train/checkpoint_seconds": took}
        return {**shares, **told, "train/checkpoints_missed": float(max(0, missed - 1))}

    def write(self, stage: str, step: int, metrics: Metrics) -> None:
        self.step = step
        if self.saved is None or self.saved > step:  # just begun, or of the stage before
            self.saved = step
        if not storage.is_remote(self.uri):  # which is written to with checkpoints alone
            self._keep()

    def saving(self) -> Callable[[], None]:
        """See `metrics.Saving`."""
        self.clock.settle()
        step, seconds = self.step, self.clock.unsaved

        def saved() -> None:
            self.saved = step
            self.clock.saved(seconds)
            self._keep()

        return saved

    def flush(self) -> None:
        """What comes with a checkpoint is kept once that is complete."""

    def close(self) -> None:
        self._keep()

    def _keep(self) -> None:
        until = self.clock.settle()
        _write(self.uri, self.clock.seconds, self.clock.unsaved, until, running=True)


def counted(cause: str) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """Of a method of what has a `clock`: its time is counted as `cause`."""

    def decorate(method: Callable[..., T]) -> Callable[..., T]:
        @functools.wraps(method)
        def timed(self: Any, *args: Any, **more: Any) -> T:
            with self.clock.during(cause):
                return method(self, *args, **more)

        return timed

    return decorate


def begin(run_dir: str, now: float) -> None:
    """A driver starts: what comes from `now` on counts, what lay between runs does not."""
    held = read(run_dir) or {"seconds": {}, "unsaved": 0.0}
    _write(storage.join(run_dir, FILE), held["seconds"], held["unsaved"], now, running=False)


def read(run_dir: str) -> dict[str, Any] | None:
    """What the run's file holds, if there is one."""
    uri = storage.join(run_dir, FILE)
    return storage.read_json(uri) if storage.exists(uri) else None


def _write(
    uri: str, seconds: Mapping[str, float], unsaved: float, until: float, running: bool
) -> None:
    held = {"seconds": dict(seconds), "unsaved": unsaved, "until": until, "running": running}
    storage.write_json(uri, held)

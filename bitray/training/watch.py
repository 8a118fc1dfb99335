"""Workers that hang and workers that are slow: noticed without a collective of its own."""

import faulthandler
import statistics
import sys
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch

from bitray.models.families import decoder_layers
from bitray.models.losses import LossModel

MEDIANS = 20
"""A step may take so many times the median one before it counts as hanging."""
BETWEEN = 10
"""Side work, such as evaluations and checkpoints, may take so many times as long as a step."""
STEPS = 10
"""Over which the workers' own work is compared."""
SLOWER = 1.5
"""A worker is slow if its own work takes so many times that of the others, and"""
SHARE, LEAST = 0.1, 0.02
"""if the difference is this share of a step, and more seconds than noise."""


class Watchdog:
    """A thread that calls `hung(seconds, median)` once if no step ends for `seconds` and for
    `MEDIANS` times the median step. The first step, which may compile, is not watched."""

    def __init__(self, seconds: float, hung: Callable[[float, float], None]) -> None:
        self.seconds, self._hung = seconds, hung
        self._steps: deque[float] = deque(maxlen=100)
        self._since: float | None = None
        self._factor = 1
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="watchdog", daemon=True).start()

    def ended(self, _: Any = None) -> None:
        """A step is done; side work follows."""
        if self._since is not None:
            self._steps.append(time.monotonic() - self._since)
        self._since, self._factor = time.monotonic(), BETWEEN

    def begins(self, _: Any = None) -> None:
        """The side work is done."""
        self._since, self._factor = time.monotonic(), 1

    def close(self) -> None:
        """Stop watching."""
        self._closed.set()

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.seconds / 4)):
            since, median = self._since, statistics.median(self._steps or [0.0])
            limit = max(self.seconds, MEDIANS * median) * self._factor
            if since is not None and time.monotonic() - since > limit:
                self._hung(time.monotonic() - since, median)
                return


def stacks() -> str:
    """The stacks of all threads of this process."""
    with tempfile.TemporaryFile("w+") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read()


def place(thread: int) -> str:
    """What a thread is at: the innermost line of ours, and whether it waits for other workers."""
    frame: FrameType | None = sys._current_frames().get(thread)
    waits, at = False, "nowhere"
    while frame is not None:
        name = frame.f_code.co_filename
        waits |= "/torch/distributed/" in name
        if "/bitray/" in name:
            at = f"{name.rpartition('/bitray/')[2]}:{frame.f_lineno} {frame.f_code.co_qualname}"
            break
        frame = frame.f_back
    return f"waiting for other workers in {at}" if waits else f"in {at}"


@dataclass
class OwnWork:
    """Seconds of a worker's own work in a step: what it does before the first collective, and in
    its decoder layers, forward and back, between whose ends FSDP does not wait. All other times are
    alike on all workers, because they wait for each other. Layers are watched inside a `with`; its
    hooks have to come after FSDP's, which gather and reduce outside of them."""

    model: LossModel
    device: torch.device
    step_seconds: float = 0.0
    """From the beginning of the last step to that of this one."""
    _began: float = field(default_factory=time.perf_counter)
    _spans: list[list[Any]] = field(default_factory=list)
    """Beginning and end."""
    _layers: float = 0.0
    _hooks: ExitStack = field(default_factory=ExitStack)

    def __enter__(self) -> None:
        for layer in decoder_layers(self.model.model):
            self._hooks.callback(layer.register_forward_pre_hook(self._enter).remove)
            self._hooks.callback(layer.register_forward_hook(self._leave).remove)

    def __exit__(self, *_: object) -> None:
        self._hooks.close()

    def begin(self) -> None:
        """A step begins."""
        before, self._began = self._began, time.perf_counter()
        self.step_seconds = self._began - before
        self._spans.clear()

    def seconds(self) -> float:
        """At the first collective of a step: of this step so far, and in the layers of the last."""
        return time.perf_counter() - self._began + self._layers

    def end(self) -> None:
        """The step is done, and what its device was given."""
        self._layers = sum(_between(*span) for span in self._spans if len(span) == 2)
        self._spans.clear()

    def _mark(self, span: list[Any]) -> None:
        if self.device.type != "cuda":
            span.append(time.perf_counter())
            return
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        span.append(event)

    def _enter(self, *_: Any) -> None:
        self._spans.append([])
        self._mark(self._spans[-1])

    def _leave(self, _: Any, inputs: tuple[Any, ...], output: Any) -> None:
        self._mark(self._spans[-1])
        result = output[0] if isinstance(output, tuple) else output
        if result.requires_grad and inputs and inputs[0].requires_grad:
            back: list[Any] = []
            self._spans.append(back)
            result.register_hook(lambda _: self._mark(back))
            inputs[0].register_hook(lambda _: self._mark(back))


def _between(start: Any, end: Any) -> float:
    """Seconds."""
    return end - start if isinstance(start, float) else start.elapsed_time(end) / 1000


@dataclass
class Stragglers:
    """Names a worker that is slower than the others over the last `STEPS` steps."""

    steps: list[Sequence[float]] = field(default_factory=list)
    """Seconds of own work of every worker, step by step."""
    named: set[int] = field(default_factory=set)

    def note(self, seconds: Sequence[float], step_seconds: float) -> str | None:
        """Take note of a step; a sentence if it shows a slow worker for the first time."""
        self.steps.append(seconds)
        if len(self.steps) < STEPS or len(seconds) < 2:
            return None
        found, self.steps = [statistics.median(own) for own in zip(*self.steps, strict=True)], []
        slowest = max(range(len(found)), key=lambda rank: found[rank])
        others = statistics.median(found[:slowest] + found[slowest + 1 :])
        late = found[slowest] - others
        if found[slowest] < SLOWER * others or late < max(SHARE * step_seconds, LEAST):
            self.named.clear()
            return None
        if slowest in self.named:
            return None
        self.named.add(slowest)
        return (
            f"worker {slowest} is slow: {found[slowest]:.3g} s of own work in a step, the others "
            f"{others:.3g} s"
        )

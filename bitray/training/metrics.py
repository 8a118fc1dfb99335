"""Where numbers go: a JSON-lines file, TensorBoard, Weights & Biases, and a line for people."""

import json
import logging
import math
import os
import queue
import threading
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from bitray import storage
from bitray.scratch import Scratch

log = logging.getLogger("bitray")
Metrics = Mapping[str, float]
CLOSING_SECONDS = 30.0
"""How long the end of a stage waits for a tracker."""


@runtime_checkable
class Sink(Protocol):
    """Takes the metrics of a step. Called on rank 0 only."""

    def write(self, stage: str, step: int, metrics: Metrics) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...


@runtime_checkable
class Saving(Protocol):
    """A sink for which it matters whether a checkpoint holds the steps that it was told of."""

    def saving(self) -> Callable[[], None]:
        """A checkpoint begins; to be called once it is complete, when more steps may have gone."""
        ...


class JsonLines:
    """`metrics.jsonl` of a run, one object a line. Steps that a resumed run takes again replace
    their first lines, so no step is there twice. Object storage has no appending: there the file is
    written anew, from a thread, with checkpoints and, for a sweep decides by them, with held-out
    losses."""

    def __init__(self, uri: str, stage: str, step: int) -> None:
        self.uri = uri
        remote = storage.is_remote(uri)
        self.thread = ThreadPoolExecutor(1, "metrics") if remote else None
        self.scratch = Scratch() if remote else None
        self.path = Path(self.scratch.path, "metrics.jsonl") if self.scratch else Path(uri)
        kept = [line for line in _lines(uri) if _is_before(json.loads(line), stage, step)]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        storage.write_text(str(self.path), "".join(f"{line}\n" for line in kept))
        self.file = self.path.open("a")

    def write(self, stage: str, step: int, metrics: Metrics) -> None:
        record = {"stage": stage, "step": step, "time": round(time.time(), 3)}
        numbers = {k: v if math.isfinite(v) else str(v) for k, v in metrics.items()}
        self.file.write(json.dumps({**record, **numbers}) + "\n")
        self.file.flush()
        if self.thread and any(name.startswith("eval/") for name in metrics):
            self.thread.submit(self._upload)  # what goes wrong with it, the next flush meets too

    def flush(self) -> None:
        if self.thread:
            self.thread.submit(self._upload).result()

    def _upload(self) -> None:
        """The file as it is at this moment: others go on to write it."""
        storage.write_bytes(self.uri, self.path.read_bytes())

    def close(self) -> None:
        self.flush()
        self.file.close()
        if self.thread:
            self.thread.shutdown()
        if self.scratch:
            self.scratch.close()


def _lines(uri: str) -> list[str]:
    """The whole lines of a file; a crash may have left half of the last one."""
    if not storage.exists(uri):
        return []
    return storage.read_text(uri).rpartition("\n")[0].splitlines()


def _is_before(record: Mapping[str, Any], stage: str, step: int) -> bool:
    return record["stage"] != stage or record["step"] <= step


class TensorBoard:
    """Event files, one folder a stage; steps taken again are purged."""

    def __init__(self, directory: str, stage: str, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.uri = storage.join(directory, stage)
        self.scratch = Scratch() if storage.is_remote(directory) else None
        self.path = self.scratch.path if self.scratch else self.uri
        self.writer = SummaryWriter(self.path, purge_step=step + 1 if step else None)

    def write(self, stage: str, step: int, metrics: Metrics) -> None:
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def flush(self) -> None:
        self.writer.flush()
        for file in Path(self.path).iterdir() if self.scratch else ():
            storage.write_bytes(storage.join(self.uri, file.name), file.read_bytes())

    def close(self) -> None:
        self.flush()
        self.writer.close()
        if self.scratch:
            self.scratch.close()


class WeightsAndBiases:
    """One W&B run over all stages and restarts. It is spoken to from a thread, so that a tracker
    that is down or slow never costs a step; what it missed is in `metrics.jsonl`. W&B takes nothing
    back, so it is told of steps once a checkpoint holds them: they are not taken again."""

    def __init__(
        self,
        project: str,
        name: str,
        run_id: str,
        directory: str,
        config: Any,
        *,
        group: str | None = None,
        tags: Sequence[str] = (),
    ) -> None:
        online = bool(os.environ.get("WANDB_API_KEY")) or os.environ.get("WANDB_MODE") == "online"
        self.uri = storage.join(directory, "wandb")
        remote = storage.is_remote(directory)
        self.scratch = Scratch() if remote else None
        arguments = {
            "project": project, "name": name, "id": run_id, "resume": "allow", "config": config,
            "group": group, "tags": list(tags),
            "dir": self.scratch.path if self.scratch else directory,
            "mode": "online" if online else "offline",
        }  # fmt: skip
        self.held: list[dict[str, float]] = []
        self.records: queue.SimpleQueue[dict[str, float] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self._send, args=(arguments,), daemon=True)
        self.thread.start()

    def _send(self, arguments: dict[str, Any]) -> None:
        import wandb

        try:
            run = wandb.init(**arguments)
            while (record := self.records.get()) is not None:
                run.log(record)
            run.finish()
            if self.scratch and arguments["mode"] == "offline":
                wandb.teardown()  # W&B's own process goes on to write for a moment
                storage.upload(os.path.join(self.scratch.path, "wandb"), self.uri)
        except Exception as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            warnings.warn(f"Weights & Biases failed, training goes on: {reason}", stacklevel=1)

    def write(self, stage: str, step: int, metrics: Metrics) -> None:
        record = {f"{stage}/{name}": value for name, value in metrics.items()}
        self.held.append({**record, f"{stage}/step": step})

    def saving(self) -> Callable[[], None]:
        held, self.held = self.held, []

        def saved() -> None:
            for record in held:
                self.records.put(record)

        return saved

    def flush(self) -> None: ...

    def close(self) -> None:
        """Waits until all is sent, but not for ever."""
        self.saving()()
        self.records.put(None)
        self.thread.join(timeout=CLOSING_SECONDS)
        if self.scratch:
            self.scratch.close()


class Console:
    """One readable line: stage, step, loss, rate, time left."""

    def __init__(self, total_steps: int, say: Callable[[str], None] = print) -> None:
        self.total_steps, self.say = total_steps, say
        self.started: tuple[float, int] | None = None

    def write(self, stage: str, step: int, metrics: Metrics) -> None:
        evaluated = {k: v for k, v in metrics.items() if k.startswith("eval/")}
        if evaluated:
            shown = "  ".join(
                f"{k[5:].removesuffix('_loss')} {v:.3f}" for k, v in evaluated.items()
            )
            self.say(f"{stage:<9} step {step}/{self.total_steps}  held out: {shown}")
        if "train/loss" not in metrics:
            return
        now = time.monotonic()
        self.started = self.started or (now, step)
        rate = metrics.get("train/tokens_per_second", 0.0)
        self.say(
            f"{stage:<9} step {step}/{self.total_steps}  loss {metrics['train/loss']:.3f}  "
            f"{rate / 1000:.1f}k tokens/s  {self._left(now, step)} left"
        )

    def _left(self, now: float, step: int) -> str:
        assert self.started is not None
        since, first = self.started
        if step == first:
            return "?"
        seconds = (self.total_steps - step) * (now - since) / (step - first)
        return time.strftime("%H:%M:%S" if seconds >= 3600 else "%M:%S", time.gmtime(seconds))

    def flush(self) -> None: ...

    def close(self) -> None: ...


def write_all(sinks: Sequence[Sink], stage: str, step: int, metrics: Metrics) -> None:
    """The same numbers to every sink."""
    for sink in sinks:
        sink.write(stage, step, metrics)


def close_all(sinks: Sequence[Sink]) -> None:
    """No more numbers come."""
    for sink in sinks:
        sink.close()

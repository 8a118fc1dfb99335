"""Audit events of a run: what each of its writers did and when, for `scripts/audit_run.py`.

    events/000003-driver-9f3c.jsonl

One file per writer and attempt, which only that writer extends; the number is the epoch of the
lease that it wrote under. Steps and losses are in `metrics.jsonl`, not here.
"""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from bitray import storage
from bitray.lease import Claim
from bitray.settings import UserError

FOLDER = "events"


class Events:
    """A writer's events. Object storage has no appending: there the file is written anew, from a
    thread, so that storage which does not answer stops nobody."""

    def __init__(self, claim: Claim, writer: str) -> None:
        name = f"{claim.epoch:06d}-{writer}-{os.urandom(4).hex()}.jsonl"
        self.uri = storage.join(claim.run_dir, FOLDER, name)
        self.claim = claim
        self._lines: list[str] = []
        self._thread = ThreadPoolExecutor(1, "events") if storage.is_remote(self.uri) else None

    def write(self, kind: str, **facts: Any) -> None:
        """Record that something happened; `facts` are JSON-able."""
        event = {"time": round(time.time(), 3), "kind": kind, "epoch": self.claim.epoch, **facts}
        line = json.dumps(event) + "\n"
        if self._thread is None:
            _append(Path(storage.local_path(self.uri)), line)
            return
        self._lines.append(line)
        self._thread.submit(storage.write_text, self.uri, "".join(self._lines))

    def close(self) -> None:
        """Wait until all is written."""
        if self._thread is not None:
            self._thread.shutdown()


def read_events(run_dir: str) -> list[dict[str, Any]]:
    """All events of a run in the order of their times, each with the `file` that it is in."""
    return sorted(_read(run_dir), key=lambda event: event["time"])


def _read(run_dir: str) -> Iterator[dict[str, Any]]:
    folder = storage.join(run_dir, FOLDER)
    for found in storage.list_files(folder, (".jsonl",)) if storage.exists(folder) else ():
        for number, event in enumerate(storage.read_json_lines(found.uri), 1):
            if not isinstance(event, dict) or not event.keys() >= {"time", "kind", "epoch"}:
                raise UserError(f"{found.uri}, line {number}: is no event")
            yield event | {"file": found.uri}


def _append(path: Path, line: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.write(line)
        file.flush()
        os.fsync(file.fileno())

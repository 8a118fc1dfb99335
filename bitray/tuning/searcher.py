"""Ax behind Ray Tune's interface: one thread owns Ax, Tune's loop only exchanges events with it.

Everything that happens to Ax is an event in a queue (make a candidate, a result, an end), and the
thread takes them one by one. So the loop never waits for a fit, Ax's state is a function of the
order of Tune's calls and the seed, and what is saved is the state after some events together with
those still to come: a copy at any moment is whole.
"""

import json
import math
import threading
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune.search import Searcher

from bitray import storage
from bitray.settings import UserError, nearest
from bitray.tuning.space import SearchSpace

Event = dict[str, Any]


@dataclass(frozen=True)
class Found:
    """A trial that ended: its index, settings of the run, how, and what it reported last."""

    index: int
    overrides: dict[str, Any]
    status: str
    metrics: dict[str, float]


def front(space: SearchSpace, trials: Sequence[Found]) -> list[Found]:
    """Those of which no other is better in all objectives, see `AxSearcher.front`."""
    known = [t for t in trials if t.status == "completed" and space.allows(t.metrics)]
    return [a for a in known if not any(_dominates(space, b, a) for b in known)]


def _dominates(space: SearchSpace, one: Found, other: Found) -> bool:
    gains = [
        (other.metrics[name] - one.metrics[name]) * (1 if how == "minimize" else -1)
        for name, how in space.objectives.items()
    ]
    if any(gains):
        return min(gains) >= 0
    return len(gains) == 1 and one.index < other.index


class AxSearcher(Searcher):
    """Sobol points, then BoTorch's. A sample is `{path: value}` for `config.override`.

    A trial reports the space's metrics, `progress` (share of the trial that is done, 1 at its end)
    and optionally `tokens` (what progressions are counted in, else `training_iteration`); one that
    cannot be had, because it diverges or does not fit, reports `abandoned`, the reason.
    `ahead` candidates are made before anyone asks, without the results that come in meanwhile.
    With a `file` all state is kept there at every change, and found there again.
    """

    def __init__(self, space: SearchSpace, *, ahead: int = 1, file: str | None = None) -> None:
        super().__init__()
        self.space, self.ahead, self.file = space, ahead, file
        self._set(storage.read_json(file) if file and storage.exists(file) else {})

    # ---------------------------------------------------------------------- Tune's interface

    def suggest(self, trial_id: str) -> Any:
        """A sample; None while none is ready; FINISHED after `num_trials` of them."""
        with self._changed:
            self._check()
            if not self._ready:
                self._ask(max(1, self.ahead))
                return None if self._coming() else Searcher.FINISHED
            index = self._ready.pop(0)
            self._trials[trial_id] = index
            self._ask(self.ahead)
            self._keep()
            return dict(self._overrides[index])

    def on_trial_result(self, trial_id: str, result: dict[str, Any]) -> None:
        """Metrics on the way, at their progression."""
        self._put(self._event("result", trial_id, result))

    def on_trial_complete(
        self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False
    ) -> None:
        """The end of a trial, however it ended. `UserError` for a metric it did not report."""
        status = self.status(result, error)
        if result and status == "completed":
            self._check_reported(result)
        self._put(self._event(status, trial_id, result or {}))

    def status(self, result: Mapping[str, Any] | None, error: bool = False) -> str:
        """How a trial ended whose last result this is."""
        if error or not result:
            return "failed"  # which tells nothing against these settings
        values = [result[name] for name in self.space.objectives if name in result]
        if result.get("abandoned") or not all(map(math.isfinite, values)):
            return "abandoned"
        return "completed" if result.get("progress", 1.0) >= 1 else "early_stopped"

    def _check_reported(self, result: Mapping[str, Any]) -> None:
        for name in self.space.metrics():
            if name not in result:
                known = [key for key, value in result.items() if isinstance(value, float)]
                raise UserError(
                    f"the trial did not report {name}{nearest(name, known)}; it reported: "
                    + (", ".join(known) or "nothing")
                )

    def _event(self, what: str, trial_id: str, result: Mapping[str, Any]) -> Event:
        """What happened, with the settings: a trial that was restored may have an id of its own.
        Tune flattens results."""
        said = dict(result.get("config") or {})
        said |= {k.removeprefix("config/"): v for k, v in result.items() if k[:7] == "config/"}
        config = {path: value for path, value in said.items() if path in self.space.parameters}
        metrics = {
            name: float(result[name])
            for name in self.space.metrics()
            if name in result and math.isfinite(result[name])
        }
        at = result.get("tokens", result.get("training_iteration"))
        return {"do": what, "id": trial_id, "config": config, "metrics": metrics, "at": at}

    # ------------------------------------------------------------------------------- saving

    def save(self, checkpoint_path: str) -> None:
        """All state as JSON. Does not wait for Ax."""
        Path(checkpoint_path).write_text(json.dumps(self.get_state()))

    def restore(self, checkpoint_path: str) -> None:
        """Go on from what `save` wrote, possibly with a space that allows for more trials."""
        self.set_state(json.loads(Path(checkpoint_path).read_text()))

    def get_state(self) -> dict[str, Any]:
        """State after some events, and the events still to come."""
        with self._changed:
            self._check()
            return self._state()

    def _state(self) -> dict[str, Any]:
        return {
            "ax": self._snapshot,
            "overrides": list(self._overrides.items()),
            "ended": list(self._ended.items()),
            "ready": list(self._ready),
            "trials": dict(self._trials),
            "made": self._made,
            "exhausted": self._exhausted,
            "events": list(self._events),
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Go on from what `get_state` gave."""
        self._stop()
        self._set(state)

    def hand_out_again(self) -> None:
        """Have trials that were begun and did not end, or failed, suggested once more before all
        others: for a driver that starts anew and whose trials continue where they stood. Waits for
        Ax, which else might take what earlier trials told for a sign of life."""
        self.settle()
        with self._changed:
            failed = [i for i, (status, _) in self._ended.items() if status == "failed"]
            begun = sorted(i for i in set(self._trials.values()) if i not in self._ended)
            self._ready[:0] = begun
            for trial in [t for t, i in self._trials.items() if i in {*begun, *failed}]:
                del self._trials[trial]
            for index in failed:
                self._put({"do": "again", "index": index})
        self.settle()

    def __getstate__(self) -> dict[str, Any]:
        said = {
            name: self.__dict__[name] for name in ("_metric", "_mode", "space", "ahead", "file")
        }
        return {"said": said, "state": self.get_state()}

    def __setstate__(self, pickled: dict[str, Any]) -> None:
        self.__dict__.update(pickled["said"])
        self._set(pickled["state"])

    # ------------------------------------------------------------------------------- results

    def settle(self) -> None:
        """Wait until Ax knows all that has happened."""
        with self._changed:
            self._check()
            self._changed.wait_for(lambda: self._error or not self._events)
            self._check()

    def ended(self) -> list[Found]:
        """Trials that ended. Waits for Ax."""
        self.settle()
        with self._changed:
            return [
                Found(index, dict(self._overrides[index]), status, dict(metrics))
                for index, (status, metrics) in self._ended.items()
            ]

    def front(self) -> list[Found]:
        """Trials of which no other is better in all objectives, among those that completed and keep
        the outcome constraints; of a single objective the best one. Waits for Ax."""
        return front(self.space, self.ended())

    def index(self, trial_id: str) -> int | None:
        """Ax's number of a trial of Tune."""
        return self._trials.get(trial_id)

    # --------------------------------------------------------------------- the thread with Ax

    def _set(self, state: Mapping[str, Any]) -> None:
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._stopped = False
        self._client: Any = None
        self._snapshot: str | None = state.get("ax")
        self._overrides: dict[int, dict[str, Any]] = dict(state.get("overrides", ()))
        self._ended: dict[int, tuple[str, dict[str, float]]] = dict(state.get("ended", ()))
        self._ready: list[int] = list(state.get("ready", ()))
        self._trials: dict[str, int] = dict(state.get("trials", {}))
        self._made: int = state.get("made", 0)
        self._exhausted: bool = state.get("exhausted", False)
        self._events: deque[Event] = deque(state.get("events", ()))

    def _check(self) -> None:
        """Raise what went wrong in the thread, or have it run."""
        if self._error:
            raise self._error
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="ax", daemon=True)
            self._thread.start()

    def _stop(self) -> None:
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        if self._thread:
            self._thread.join()

    def _put(self, event: Event) -> None:
        with self._changed:
            self._check()
            self._events.append(event)
            self._keep()
            self._changed.notify_all()

    def _keep(self) -> None:
        if self.file:
            storage.write_json(self.file, self._state())

    def _coming(self) -> int:
        return sum(event["do"] == "generate" for event in self._events)

    def _ask(self, wanted: int) -> None:
        """Have as many candidates made as `wanted` are ready or coming, if there are to be more."""
        coming = self._coming()
        left = 0 if self._exhausted else self.space.num_trials - self._made - coming
        for _ in range(min(wanted - len(self._ready) - coming, left)):
            self._put({"do": "generate"})

    def _work(self) -> None:
        from bitray.tuning.experiment import client_of, from_json

        try:
            text = self._snapshot
            self._client = from_json(text) if text else client_of(self.space)
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._stopped or self._events)
                    if self._stopped:
                        return
                    event = self._events[0]
                handle = {"generate": self._generate, "again": self._again}
                handle.get(event["do"], self._tell)(event)
        except BaseException as error:
            with self._changed:
                self._error = error
                self._changed.notify_all()

    def _done(self) -> str:
        """Ax's state after the event, to be kept in one go with what else it changes."""
        from bitray.tuning.experiment import as_json

        return as_json(self._client)

    def _generate(self, event: Event) -> None:
        from ax.exceptions.core import SearchSpaceExhausted

        from bitray.tuning.experiment import candidate

        try:
            index, overrides = candidate(self._client, self.space, self._made)
        except SearchSpaceExhausted:
            with self._changed:
                self._exhausted = True
                self._events.popleft()
                self._changed.notify_all()
            return
        snapshot = self._done()
        with self._changed:
            self._snapshot = snapshot
            self._overrides[index] = overrides
            self._made += 1
            self._ready.append(index)
            self._events.popleft()
            self._keep()
            self._changed.notify_all()

    def _again(self, event: Event) -> None:
        """Put another trial into the place of one that failed, which Ax takes no results of."""
        failed = event["index"]
        overrides = self._overrides[failed]
        index = int(self._client.attach_trial(self.space.point(overrides)))
        snapshot = self._done()
        with self._changed:
            self._snapshot = snapshot
            del self._ended[failed], self._overrides[failed]
            self._overrides[index] = overrides
            self._ready.insert(0, index)
            self._events.popleft()
            self._keep()
            self._changed.notify_all()

    def _tell(self, event: Event) -> None:
        index, status = self._index(event), event["do"]
        if index is not None:
            at = None if event["at"] is None else int(event["at"])
            if event["metrics"] and status not in ("failed", "abandoned"):
                self._client.attach_data(index, event["metrics"], progression=at)
            if status == "completed":
                self._client.complete_trial(index)
            elif status != "result":
                getattr(self._client, f"mark_trial_{status}")(index)
        snapshot = self._done()
        with self._changed:
            self._snapshot = snapshot
            if index is not None:
                self._trials[event["id"]] = index
                self._overrides.setdefault(index, event["config"])
                if index in self._ready:  # saved before it was handed out
                    self._ready.remove(index)
                if status != "result":
                    self._ended[index] = (status, event["metrics"])
            self._events.popleft()
            self._keep()
            self._changed.notify_all()

    def _index(self, event: Event) -> int | None:
        """Ax's number of the trial an event is about; None if there is nothing to tell it."""
        with self._changed:
            known = self._trials.get(event["id"])
            taken = set(self._trials.values())
            if known is not None and known not in self._ended:
                return known
            if known is not None and self._ended[known][0] != "failed":
                return None  # told twice
            config = self._overrides[known] if known is not None else event["config"]
            alike = [i for i, said in self._overrides.items() if config and _same(said, config)]
        running = [i for i in alike if i not in self._ended and (known is None or i not in taken)]
        if running:
            return min(running, key=lambda i: i in taken)
        if event["do"] == "failed" or not config:
            return None
        point = self.space.point(config)
        return int(self._client.attach_trial(point))


def _same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)

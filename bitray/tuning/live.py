"""How a sweep stands, while it goes on: a table on a terminal, lines elsewhere."""

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ray.tune import Callback

from bitray.pipeline.report import Table, cell
from bitray.tuning.parameter import labels
from bitray.tuning.searcher import AxSearcher, Found, front
from bitray.tuning.space import SearchSpace

PERIOD = 10.0
"""Seconds between two looks at trials that go on; each end of a trial is told at once."""


@dataclass(frozen=True)
class Standing:
    """A trial as it stands."""

    index: int
    state: str
    """`waits`, `runs`, or how it ended."""
    overrides: Mapping[str, Any]
    result: Mapping[str, Any]
    """What it reported last."""
    seconds: float = 0.0
    """Since it began."""
    reason: str = ""
    """Why it was given up or failed."""

    @property
    def going(self) -> bool:
        return self.state in ("waits", "runs")

    @property
    def progress(self) -> float:
        """Share of the trial that is done."""
        return float(self.result.get("progress", 0.0))

    @property
    def left(self) -> float | None:
        """Seconds until its end at the pace it has; None if that is not known or there are none."""
        if self.state != "runs" or not self.progress:
            return None
        return self.seconds * (1 - self.progress) / self.progress


class Watch(Callback):
    """Shows the trials of a sweep as Tune calls it. `before`: trials that ended in earlier sessions
    of the sweep; they count, and may be the best."""

    def __init__(self, searcher: AxSearcher, before: Sequence[Found]) -> None:
        os.environ["RAY_AIR_NEW_OUTPUT"] = "0"  # else Tune prints a head though told to be silent
        self.searcher, self.before = searcher, list(before)
        self.began, self.looked = time.monotonic(), -PERIOD
        self.started: dict[str, float] = {}
        self.ended: dict[str, Standing] = {}
        self.screen: Any = None

    # ---------------------------------------------------------------------- Tune's interface

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.started[trial.trial_id] = time.monotonic()

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self._end(trials, trial, self.searcher.status(trial.last_result))

    def on_trial_error(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        # `trial.get_error()` looks into storage, where the traceback comes later
        last = Path(trial.error_file).read_text().strip().rpartition("\n")[2]
        self._end(trials, trial, self.searcher.status(None, error=True), last)

    def on_step_end(self, iteration: int, trials: list[Any], **_: Any) -> None:
        if time.monotonic() - self.looked >= PERIOD:
            self._show(self._standings(trials))

    def on_experiment_end(self, trials: list[Any], **_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Leave the terminal as it was, with the table as it is."""
        if self.screen:
            self.screen.stop()
            self.screen = None

    # ------------------------------------------------------------------------------ looking

    def _end(self, trials: list[Any], trial: Any, state: str, reason: str = "") -> None:
        reason = reason or (trial.last_result or {}).get("abandoned", "")
        self.ended[trial.trial_id] = each = self._standing(trial, state, reason)
        if not sys.stdout.isatty():
            print(line(self.searcher.space, each), flush=True)
        self._show(self._standings(trials))

    def _standings(self, trials: Sequence[Any]) -> list[Standing]:
        return [
            self.ended.get(trial.trial_id)
            or self._standing(trial, "runs" if trial.status == "RUNNING" else "waits")
            for trial in trials
        ]

    def _standing(self, trial: Any, state: str, reason: str = "") -> Standing:
        index = self.searcher.index(trial.trial_id)
        since = self.started.get(trial.trial_id, time.monotonic())
        seconds = time.monotonic() - since
        result = trial.last_result or {}
        index = -1 if index is None else index
        return Standing(index, state, trial.config, result, seconds, reason)

    def _show(self, standings: Sequence[Standing]) -> None:
        self.looked = time.monotonic()
        told = summary(self.searcher.space, self.before, standings, self.looked - self.began)
        if not sys.stdout.isatty():
            print(told, flush=True)
            return
        from rich.console import Console, Group
        from rich.live import Live
        from rich.text import Text

        if self.screen is None:
            self.screen = Live(console=Console(), auto_refresh=False)
            self.screen.start()
        shown = table(self.searcher.space, standings)  # below, for what is too long is cut there
        self.screen.update(Group(Text(told), _rich(shown)), refresh=True)


# ------------------------------------------------------------------------------------- the words


def table(space: SearchSpace, standings: Sequence[Standing]) -> Table:
    """Those that go on first, then those that ended, the newest on top."""
    metrics = list(dict.fromkeys(["loss", *space.objectives]))
    names = labels(space.parameters)
    rows = [
        [
            f"{each.index}",
            each.state.replace("_", " "),
            f"{each.progress:.0%}",
            *(cell(each.result.get(name)) for name in metrics),
            cell(each.result.get("tokens_per_second")),
            "" if each.left is None else clock(each.left),
            *(cell(each.overrides.get(path)) for path in names),
        ]
        for each in sorted(standings, key=lambda each: (not each.going, -each.index))
    ]
    header = ["trial", "state", "done", *metrics, "tokens/s", "left", *names.values()]
    return Table(header, rows)


def line(space: SearchSpace, each: Standing) -> str:
    """A trial that ended."""
    said = ", ".join(
        f"{label} {cell(each.overrides[path])}"
        for path, label in labels(space.parameters).items()
        if path in each.overrides
    )
    why = f" ({each.reason})" if each.reason else ""
    return (
        f"trial {each.index} {each.state.replace('_', ' ')}{why} at {each.progress:.0%} after "
        f"{clock(each.seconds)}: {_metrics(space, each.result)}  [{said}]"
    )


def summary(
    space: SearchSpace, before: Sequence[Found], standings: Sequence[Standing], seconds: float
) -> str:
    """One line: what goes on, how many ended, the best, the rate and the time left."""
    going = [each for each in standings if each.state == "runs"]
    ended = [each for each in standings if not each.going]
    total = space.num_trials
    runs = ", ".join(
        f"{each.index} {each.progress:.0%} {_metrics(space, each.result)}".rstrip()
        for each in going
    )
    known = [Found(e.index, dict(e.overrides), e.state, dict(e.result)) for e in ended]
    best = front(space, [*before, *known])
    told = [
        f"{len(before) + len(ended)} of {total} trials ended",
        f"running {runs}" if runs else "none runs",
        *([f"best {', '.join(_best(space, each) for each in best)}"] if best else []),
    ]
    if ended:
        told.append(f"{len(ended) / seconds * 3600:.3g} trials/h")
        done = len(ended) + sum(each.progress for each in going)
        left = total - len(before) - done
        told.append(f"{clock(left * seconds / done)} left")
    return "; ".join(told)


def clock(seconds: float) -> str:
    """`1:02:03`, or `2:03` below an hour."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def _best(space: SearchSpace, found: Found) -> str:
    told = " ".join(f"{name} {found.metrics[name]:.4g}" for name in space.objectives)
    return f"{found.index} ({told})"


def _metrics(space: SearchSpace, result: Mapping[str, Any]) -> str:
    names = dict.fromkeys(["loss", *space.objectives])
    return ", ".join(f"{name} {cell(result[name])}" for name in names if name in result)


def _rich(shown: Table) -> Any:
    from rich import box
    from rich.table import Table as RichTable
    from rich.text import Text

    drawn = RichTable(box=box.SIMPLE_HEAD)
    for at, name in enumerate(shown.header):
        drawn.add_column(Text(name), justify="left" if at == 1 else "right", overflow="fold")
    for row in shown.rows:
        drawn.add_row(*(Text(cell) for cell in row))
    return drawn

"""What trials cost: when they held their workers, written down as they go, and added up."""

import time
from collections.abc import Iterable
from typing import Any

from ray.tune import Callback

from bitray import storage
from bitray.pipeline.config import Config
from bitray.pipeline.plan import needed
from bitray.pipeline.report import Table
from bitray.tuning.searcher import Found
from bitray.tuning.stages import trained
from bitray.tuning.trial import sampled, trial_name

HOUR = 3600.0
Spans = dict[str, list[list[float]]]
"""Name of a trial -> beginning and end of every attempt at it, in seconds since the epoch."""


class Clock(Callback):
    """Keeps the spans of a sweep's trials in a file: of those too that fail, are stopped, or are
    tried again. An attempt that was cut off with its driver ends at its last result."""

    def __init__(self, file: str) -> None:
        self.file, self.spans = file, read_spans(file)

    def on_trial_start(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        now = time.time()
        self.spans.setdefault(trial_name(trial.config), []).append([now, now])
        storage.write_json(self.file, self.spans)

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, *_: Any, **__: Any) -> None:
        attempts = self.spans.get(trial_name(trial.config))
        if attempts:  # else it ends before it began
            attempts[-1][1] = time.time()
            storage.write_json(self.file, self.spans)

    on_trial_complete = on_trial_error = on_trial_recover = on_trial_result


def read_spans(file: str) -> Spans:
    """What a `Clock` wrote; nothing where there was none."""
    spans: Spans = storage.read_json(file) if storage.exists(file) else {}
    return spans


def seconds(spans: Spans, found: Found) -> float | None:
    """Wall seconds of all attempts at a trial; None if nobody looked at the clock."""
    attempts = spans.get(trial_name(found.overrides))
    return None if attempts is None else sum(end - begin for begin, end in attempts)


def devices(config: Config) -> tuple[str, float]:
    """What a trial occupies: `GPU` or `worker`, and how many of them at most."""
    stages = trained(config)
    gpus = max(needed(config, name)[1] for name in stages)
    workers = max(config.scaling_of(name).most for name in stages)
    return ("GPU", gpus) if gpus else ("worker", float(workers))


def cost_table(config: Config, trials: Iterable[Found], spans: Spans) -> Table:
    """Trials, wall hours and device hours by how trials ended, and of those that did not."""
    trials = list(trials)
    kind, _ = devices(config)
    by_end: dict[str, list[tuple[float | None, float]]] = {}
    for each in trials:
        run = sampled(config, each.overrides)
        held = devices(run)[1] if run else 0.0
        by_end.setdefault(each.status, []).append((seconds(spans, each), held))
    ended = {trial_name(each.overrides) for each in trials}
    for name in spans.keys() - ended:
        wall = sum(end - begin for begin, end in spans[name])
        by_end.setdefault("not ended", []).append((wall, devices(config)[1]))
    by_end["all"] = [each for group in by_end.values() for each in group]
    return Table(
        ("end", "trials", "wall hours", f"{kind}-hours"),
        [_cost_row(end, group) for end, group in by_end.items()],
    )


def _cost_row(end: str, group: list[tuple[float | None, float]]) -> list[str]:
    known = [(wall, held) for wall, held in group if wall is not None]
    hours = sum(wall for wall, _ in known) / HOUR
    held = sum(wall * held for wall, held in known) / HOUR
    unknown = "" if len(known) == len(group) else f" ({len(group) - len(known)} not recorded)"
    return [end, f"{len(group)}", f"{hours:.4g}{unknown}", f"{held:.4g}"]

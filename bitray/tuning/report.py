"""What a sweep found: `report.md` and `report.html`, and the best configurations as files for
`--config`. All of it comes from the sweep's folder, so it can be written again at any time."""

import html
import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitray import storage
from bitray.pipeline.config import Config
from bitray.pipeline.report import Table, cell, page, pictures, section
from bitray.tuning import pictures as draw
from bitray.tuning.cost import Spans, cost_table, read_spans, seconds
from bitray.tuning.parameter import labels
from bitray.tuning.searcher import AxSearcher, Found
from bitray.tuning.space import SearchSpace
from bitray.tuning.trial import history, trial_name

COMMON = "common"
"""Of a sweep's folder: the run of what its trials have in common."""
ATTEMPTS = "attempts.json"
"""Of a sweep's folder: when its trials held their workers."""

OBSERVED = ("completed", "early_stopped")
"""Ends of trials whose metrics Ax knows."""


@dataclass(frozen=True)
class Sweep:
    """All that is known of a sweep."""

    space: SearchSpace
    config: Config
    folder: str
    trials: Sequence[Found]
    """Those that ended, by index."""
    front: Sequence[Found]
    spans: Spans
    shares: Mapping[str, Mapping[str, float]]
    """Objective -> path -> what of the objective's variance depends on it, with a sign."""
    fit: str
    """What to think of the shares, or why there are none."""

    @classmethod
    def read(cls, folder: str, space: SearchSpace, config: Config, searcher: AxSearcher) -> "Sweep":
        """Waits for Ax, and fits its model once more for the shares."""
        from bitray.tuning.experiment import importance

        trials = sorted(searcher.ended(), key=lambda each: each.index)
        spans = read_spans(storage.join(folder, ATTEMPTS))
        told = [t for t in trials if t.status in OBSERVED and set(space.objectives) <= {*t.metrics}]
        shares, fit = importance(searcher.get_state()["ax"], space, len(told))
        front = sorted(searcher.front(), key=lambda each: each.index)
        return cls(space, config, folder, trials, front, spans, shares, fit)

    @property
    def name(self) -> str:
        return self.folder.rstrip("/").rpartition("/")[2]

    def told(self) -> list[str]:
        """Objectives that any trial reported."""
        return [o for o in self.space.objectives if any(o in each.metrics for each in self.trials)]

    def best_name(self, found: Found) -> str:
        """What a trial of the front is called."""
        return "best" if len(self.space.objectives) == 1 else f"best_{found.index}"

    def best_file(self, found: Found) -> str:
        """Where the configuration of a trial of the front lies."""
        return storage.join(self.folder, f"{self.best_name(found)}.yaml")

    def best(self, found: Found) -> str:
        """The configuration of a trial of the front, as a run in a folder beside the sweep's."""
        experiment = f"{self.name}_{self.best_name(found)}"
        return self.config.override({**found.overrides, "experiment": experiment}).dump()

    def curve(self, found: Found) -> list[tuple[int, float]]:
        """Tokens and held-out loss at every evaluation of a trial."""
        told = history(self.config, storage.join(self.folder, COMMON), found.overrides)
        return [(each["tokens"], each["loss"]) for each in told]


def write_report(folder: str, space: SearchSpace, config: Config, searcher: AxSearcher) -> str:
    """Write it; a summary for the terminal."""
    sweep = Sweep.read(folder, space, config, searcher)
    for each in sweep.trials:  # an earlier front may have been another one
        storage.remove(sweep.best_file(each))
    for each in sweep.front:
        storage.write_text(sweep.best_file(each), sweep.best(each))
    told = summary(sweep)
    tables = tables_of(sweep)
    storage.write_text(storage.join(folder, "report.md"), markdown(sweep.name, told, tables))
    uri = storage.join(folder, "report.html")
    storage.write_text(uri, page(sweep.name, _parts(sweep, told, tables)))
    return "\n".join([tables["Trials"].text(), "", *told, f"report  {uri}"])


def markdown(name: str, told: Sequence[str], tables: Mapping[str, Table]) -> str:
    """`report.md`."""
    parts = [f"# {name}", "", *(f"- {line}" for line in told)]
    for title, table in tables.items():
        parts += ["", f"## {title}", "", "```", table.text(), "```"]
    return "\n".join([*parts, ""])


def summary(sweep: Sweep) -> list[str]:
    """How trials ended, which are best and where their configurations lie."""
    ends = [each.status for each in sweep.trials]
    counts = ", ".join(f"{ends.count(end)} {end}" for end in dict.fromkeys(ends))
    told = [f"{len(ends)} trials" + (f": {counts}" if counts else "")]
    for each in sweep.front:
        values = ", ".join(f"{name} {value:.4g}" for name, value in each.metrics.items())
        told.append(f"trial {each.index}: {values}  --config {sweep.best_file(each)}")
    if not sweep.front:
        told.append("no trial completed within the outcome constraints; nothing is best")
    return [*told, sweep.fit]


# ----------------------------------------------------------------------------------------- tables


def tables_of(sweep: Sweep) -> dict[str, Table]:
    """All that have rows."""
    several = len(sweep.space.objectives) > 1
    found = {
        "Pareto front": trials_table(sweep, sweep.front if several else ()),
        "Importance of parameters": importance_table(sweep.space, sweep.shares),
        **optimizer_tables(sweep.space, sweep.trials),
        "Cost of the trials": cost_table(sweep.config, sweep.trials, sweep.spans),
        "Trials": trials_table(sweep, sweep.trials),
    }
    return {title: table for title, table in found.items() if table.rows or title == "Trials"}


def trials_table(sweep: Sweep, trials: Sequence[Found]) -> Table:
    """How trials ended, their metrics, settings, wall time and folder."""
    space, names = sweep.space, labels(sweep.space.parameters)
    rows = [
        [
            str(each.index),
            each.status,
            *(cell(each.metrics.get(name)) for name in space.metrics()),
            *(cell(each.overrides.get(path)) for path in names),
            cell(seconds(sweep.spans, each)),
            trial_name(each.overrides),
        ]
        for each in trials
    ]
    header = ["trial", "end", *space.metrics(), *names.values(), "seconds", "folder"]
    return Table(header, rows)


def importance_table(space: SearchSpace, shares: Mapping[str, Mapping[str, float]]) -> Table:
    """Shares by objective; a sign says which way the objective goes with a number."""
    names = labels(space.parameters)
    paths = dict.fromkeys(path for found in shares.values() for path in found)
    most = {path: max(abs(found.get(path, 0.0)) for found in shares.values()) for path in paths}
    rows = [
        [names[path], *(_share(space, path, found[path]) for found in shares.values())]
        for path in sorted(paths, key=lambda path: -most[path])
    ]
    return Table(["parameter", *shares], rows)


def _share(space: SearchSpace, path: str, share: float) -> str:
    return f"{abs(share):.0%}" if space.parameters[path].choice else f"{share:+.0%}"


def optimizer_tables(space: SearchSpace, trials: Sequence[Found]) -> dict[str, Table]:
    """For every stage whose optimizer the space speaks of: best and median of each kind."""
    paths = [path for path in space.parameters if path.endswith("optimizer.type")]
    names = labels(space.parameters)
    return {f"By {names[path]}": _by_value(space, trials, path) for path in paths}


def _by_value(space: SearchSpace, trials: Sequence[Found], path: str) -> Table:
    groups: dict[Any, list[Found]] = {}
    for each in trials:
        groups.setdefault(each.overrides.get(path), []).append(each)
    header = [path.rpartition(".")[2], "trials", "completed"]
    header += [f"{how} {name}" for name in space.objectives for how in ("best", "median")]
    rows = []
    for value, group in groups.items():
        done = [each for each in group if each.status == "completed"]
        row = [str(value), str(len(group)), str(len(done))]
        for name, direction in space.objectives.items():
            values = [each.metrics[name] for each in done]
            pick = min if direction == "minimize" else max
            row += [cell(pick(values)), cell(statistics.median(values))] if values else ["", ""]
        rows.append(row)
    return Table(header, rows)


# ------------------------------------------------------------------------------------------- page


def _parts(sweep: Sweep, told: Sequence[str], tables: Mapping[str, Table]) -> list[str]:
    lines = "".join(f"<li>{html.escape(line)}</li>" for line in told)
    parts = [f"<ul>{lines}</ul>", section("Pictures", pictures(*_pictures(sweep)), *_wide(sweep))]
    parts += [section(title, table.html()) for title, table in tables.items()]
    for each in sweep.front:
        text = html.escape(sweep.best(each))
        title = f"Configuration of trial {each.index}"
        parts.append(section(title, f"<details><summary>YAML</summary><pre>{text}</pre></details>"))
    return parts


def _pictures(sweep: Sweep) -> list[str]:
    """Those that there is something to draw for."""
    space, trials = sweep.space, sweep.trials
    losses = {each.index: sweep.curve(each) for each in trials}
    found = [draw.trace(space, trials, objective) for objective in sweep.told()]
    if any(losses.values()):
        found.append(draw.curves(losses, trials, sweep.front))
    if sweep.front:
        pairs = itertools.combinations(space.objectives, 2)
        found += [draw.front(space, trials, sweep.front, pair) for pair in pairs]
    names = labels(space.parameters)
    return found + [draw.importance(space, s, o, names) for o, s in sweep.shares.items()]


def _wide(sweep: Sweep) -> list[str]:
    space, names = sweep.space, labels(sweep.space.parameters)
    return [draw.parallel(space, sweep.trials, objective, names) for objective in sweep.told()]

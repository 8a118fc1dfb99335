"""What a sweep found: `report.md`, and the best configuration as a file for `--config`."""

from typing import Any

from bitray import storage
from bitray.pipeline.config import Config
from bitray.pipeline.report import Table
from bitray.tuning.searcher import AxSearcher, Found
from bitray.tuning.space import SearchSpace


def write_report(folder: str, space: SearchSpace, config: Config, searcher: AxSearcher) -> str:
    """Write it; a summary for the terminal."""
    front = searcher.front()
    trials = sorted(searcher.ended(), key=lambda each: each.index)
    table = trials_table(space, trials)
    counts = {
        s: sum(t.status == s for t in trials) for s in dict.fromkeys(t.status for t in trials)
    }
    told = [f"{len(trials)} trials: " + ", ".join(f"{n} {status}" for status, n in counts.items())]
    for each in front:
        path = storage.join(folder, f"best{'' if len(front) == 1 else f'_{each.index}'}.yaml")
        storage.write_text(path, config.override(each.overrides).dump())
        told.append(f"{_metrics(each)}  --config {path}")
    if not front:
        told.append("no trial completed within the outcome constraints; nothing is best")
    lines = ["# Sweep", "", *told, "", "```", table.text(), "```", ""]
    path = storage.join(folder, "report.md")
    storage.write_text(path, "\n".join(lines))
    return "\n".join([table.text(), "", *told, f"report  {path}"])


def trials_table(space: SearchSpace, trials: list[Found]) -> Table:
    """Every trial that ended: how, its metrics, its settings."""
    names = [path.removeprefix("stages.") for path in space.parameters]
    rows = [
        [
            str(each.index),
            each.status,
            *(_cell(each.metrics.get(name)) for name in space.metrics()),
            *(_cell(each.overrides.get(path)) for path in space.parameters),
        ]
        for each in trials
    ]
    return Table(["trial", "end", *space.metrics(), *names], rows)


def _metrics(found: Found) -> str:
    told = ", ".join(f"{name} {value:.4g}" for name, value in found.metrics.items())
    return f"trial {found.index}: {told}"


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)

"""`report.html`: one self-contained page of pictures and tables about a run."""

import html
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitray import storage

Series = Mapping[str, Sequence[tuple[int, float]]]


@dataclass(frozen=True)
class Table:
    """Text cells below a header; the first column names the row."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]

    def text(self) -> str:
        """For a terminal: columns aligned, numbers to the right."""
        cells = [self.header, *self.rows]
        widths = [max(len(row[i]) for row in cells) for i in range(len(self.header))]
        lines = [
            "  ".join(
                cell.ljust(w) if i == 0 else cell.rjust(w)
                for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            )
            for row in cells
        ]
        return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])

    def html(self) -> str:
        head = "".join(f"<th>{html.escape(cell)}</th>" for cell in self.header)
        body = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>"


def cell(value: Any) -> str:
    """A value in a table: floats to four digits, nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)


PICTURES: tuple[tuple[str, tuple[str, ...], str], ...] = (
    ("Training loss", ("train/loss",), "nats"),
    ("Objectives", ("train/*_loss",), "nats"),
    ("Held-out loss", ("eval/*_loss",), "nats"),
    ("Learning rate", ("schedule/lr_*",), "per step"),
    ("Quantisation strength and objective weights", ("schedule/strength", "schedule/*_weight"), ""),
    ("Mixture: realised shares", ("mixture/share_*",), "share of tokens"),
    ("Mixture: decided weights", ("mixture/weight_*",), "share of tokens"),
    ("Influence of sources on probes", ("influence/score_*",), "score"),
    ("Loss by source", ("mixture/loss_*",), "nats"),
    ("Throughput", ("train/tokens_per_second",), "tokens/s"),
    ("Model FLOPs utilisation", ("train/mfu",), "share of the peak"),
    ("Goodput: the run's time, by cause", ("goodput/share_*",), "share of the time so far"),
    ("Gradient norm", ("train/grad_norm",), ""),
)
"""Title, patterns of metric names, unit."""

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;max-width:62rem;margin:2rem auto;padding:0 1rem;color:#222}
h1{font-size:1.6rem}h2{font-size:1.15rem;margin-top:2.2rem}svg{max-width:100%;height:auto}
table{border-collapse:collapse;margin:1rem 0}td,th{padding:.25rem .9rem;text-align:right}
td:first-child,th:first-child{text-align:left}thead{border-bottom:2px solid #888}
tbody tr:nth-child(even){background:#f4f4f4}pre{background:#f4f4f4;padding:1rem;overflow:auto;
white-space:pre-wrap}.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(27rem,1fr));gap:1rem}
figure{margin:0}figcaption{font-weight:600}
@media(prefers-color-scheme:dark){body{background:#181818;color:#ddd}svg{background:#fff}
tbody tr:nth-child(even),pre{background:#242424}}
"""


def read_metrics(run_dir: str) -> list[dict[str, Any]]:
    """All whole lines of a run's `metrics.jsonl`, which may still be written."""
    uri = storage.join(run_dir, "metrics.jsonl")
    return storage.read_json_lines(uri) if storage.exists(uri) else []


def write_report(
    run_dir: str,
    title: str,
    tables: Mapping[str, Table],
    samples: Mapping[str, Sequence[tuple[str, str]]],
    config: str,
) -> str:
    """Write the page and return where it lies. `samples`: stage -> (prompt, continuation) pairs."""
    metrics = read_metrics(run_dir)
    curves = [_figure(metrics, *picture) for picture in PICTURES]
    parts = [section(name, table.html()) for name, table in tables.items()]
    parts.append(section("Curves", pictures(*curves, _influence(metrics))))
    if samples:
        parts.append(section("Samples", *(_samples(*each) for each in samples.items())))
    parts.append(section("Configuration", f"<pre>{html.escape(config)}</pre>"))
    uri = storage.join(run_dir, "report.html")
    storage.write_text(uri, page(title, parts))
    return uri


def page(title: str, parts: Sequence[str]) -> str:
    """A page of HTML that needs no other file; `parts` follow its heading."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width"><link rel="icon" href="data:,">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{''.join(parts)}</body></html>"
    )


def section(title: str, *parts: str) -> str:
    """Parts of a page below a heading."""
    return f"<h2>{html.escape(title)}</h2>{''.join(parts)}"


def pictures(*drawn: str) -> str:
    """Pictures beside each other, as far as there is room."""
    return f'<div class="pictures">{"".join(drawn)}</div>'


def _samples(stage: str, pairs: Sequence[tuple[str, str]]) -> str:
    shown = "".join(
        f"<pre><b>{html.escape(prompt)}</b>{html.escape(text)}</pre>" for prompt, text in pairs
    )
    return f"<h3>{html.escape(stage)}</h3>{shown}"


def _figure(
    metrics: Sequence[Mapping[str, Any]], title: str, patterns: Sequence[str], unit: str
) -> str:
    """One picture as inline SVG; steps of the stages follow each other on the axis."""
    series, borders = series_of(metrics, patterns)
    if not series:
        return ""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.subplots()
    for name, points in sorted(series.items()):
        axes.plot(*zip(*points, strict=True), label=name, linewidth=1.4, marker=".", markersize=3)
    for stage, start in borders.items():
        axes.axvline(start, color="0.8", linewidth=0.8)
        place = axes.get_xaxis_transform()  # x in steps, y in parts of the picture
        axes.text(start, 0.98, f" {stage}", transform=place, fontsize=7, va="top", color="0.4")
    axes.set_xlabel("step, stages one after the other", fontsize=8)
    axes.set_ylabel(unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.25)
    if len(series) > 1 or "*" in patterns[0]:
        axes.legend(fontsize=7, frameon=False)
    return drawn(figure, title)


def drawn(figure: Any, title: str) -> str:
    """A figure of matplotlib as inline SVG with a caption; drawn again it is the same text."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.hashsalt": title}):  # names in the SVG, else random
        figure.savefig(file, format="svg", metadata={"Date": None})
    svg = file.getvalue()
    svg = svg[svg.index("<svg") :]
    return f"<figure><figcaption>{html.escape(title)}</figcaption>{svg}</figure>"


def _influence(metrics: Sequence[Mapping[str, Any]]) -> str:
    """The matrix of the last decision: what each source does for each probe."""
    held = [record for record in metrics if any(k.startswith(_WEIGHT) for k in record)]
    held = [record for record in held if influence_matrix(record)]
    if not held:
        return ""
    from matplotlib.figure import Figure

    matrix = influence_matrix(held[-1])
    sources = list(next(iter(matrix.values())))
    values = [[row[source] for source in sources] for row in matrix.values()]
    most = max(abs(value) for row in values for value in row) or 1.0
    figure = Figure(figsize=(6.4, 1.6 + 0.4 * len(matrix)), layout="constrained")
    axes = figure.subplots()
    axes.imshow(values, cmap="RdBu", vmin=-most, vmax=most, aspect="auto")
    axes.set_xticks(range(len(sources)), sources, fontsize=8, rotation=30, ha="right")
    axes.set_yticks(range(len(matrix)), list(matrix), fontsize=8)
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            colour = "white" if abs(value) > 0.6 * most else "black"
            axes.text(x, y, f"{value:.2g}", ha="center", va="center", fontsize=7, color=colour)
    where = f"{held[-1]['stage']}, step {held[-1]['step']}"
    return drawn(figure, f"Influence matrix (probes by sources), {where}")


_WEIGHT = "influence/weight_"


def influence_matrix(record: Mapping[str, Any], kind: str = "score") -> dict[str, dict[str, float]]:
    """Probe -> source -> score, from the metrics of one decision; `kind` is `score` for those that
    drive, else a method. Names may hold underscores."""
    sources = sorted((k.removeprefix(_WEIGHT) for k in record if k.startswith(_WEIGHT)), key=len)
    matrix: dict[str, dict[str, float]] = defaultdict(dict)
    for name, value in record.items():
        if name.startswith(f"influence/{kind}_"):
            pair = name.removeprefix(f"influence/{kind}_")
            source = next(s for s in reversed(sources) if pair.endswith(f"_{s}"))
            matrix[pair.removesuffix(f"_{source}")][source] = float(value)
    return dict(matrix)


def series_of(
    metrics: Sequence[Mapping[str, Any]], patterns: Sequence[str]
) -> tuple[Series, dict[str, int]]:
    """Points by name, and where each stage starts on the common axis of steps."""
    from fnmatch import fnmatch

    borders: dict[str, int] = {}
    series: dict[str, list[tuple[int, float]]] = defaultdict(list)
    last = 0
    for record in metrics:
        stage = record["stage"]
        start = borders.setdefault(stage, last)
        last = max(last, start + record["step"])
        for name, value in record.items():
            # `train/loss` is a curve of its own; other names fall under `train/*_loss`.
            found = next((p for p in patterns if fnmatch(name, p)), None)
            if found and isinstance(value, int | float):
                head, star, tail = found.partition("*")
                label = name.removeprefix(head).removesuffix(tail) if star else name
                series[label.rpartition("/")[2]].append((start + record["step"], float(value)))
    return series, borders

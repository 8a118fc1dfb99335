"""Pictures of a sweep: trace, importance, parallel coordinates, fronts, curves. Only drawing."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from bitray.pipeline.report import drawn
from bitray.tuning.parameter import Number, Parameter, encoded
from bitray.tuning.searcher import Found
from bitray.tuning.space import SearchSpace

BEST, ENDED, OTHER, FAILED = "tab:red", "tab:blue", "0.6", "tab:orange"
COLOURS = {"best": BEST, "completed": ENDED, "early_stopped": OTHER}
MARKERS = {"completed": "o", "early_stopped": "v"}
"""Of trials by their end; others have no value."""


def trace(space: SearchSpace, trials: Sequence[Found], objective: str) -> str:
    """The objective of each trial, and the best of those that completed so far."""
    axes, figure = _axes()
    for end, marker in MARKERS.items():
        points = [(t.index, t.metrics[objective]) for t in trials if _has(t, end, objective)]
        if points:
            axes.plot(
                *_columns(points), marker, color=COLOURS[end], markersize=5, label=_words(end)
            )
    best = best_so_far(space, trials, objective)
    if best:
        axes.step(*_columns(best), where="post", color=BEST, linewidth=1.4, label="best so far")
    _label(axes, "trial", objective)
    axes.xaxis.get_major_locator().set_params(integer=True)
    return drawn(figure, f"Optimisation trace: {objective}")


def best_so_far(
    space: SearchSpace, trials: Sequence[Found], objective: str
) -> list[tuple[int, float]]:
    """Index of each trial that counts, and the best objective up to it; up to the last trial."""
    pick = min if space.objectives[objective] == "minimize" else max
    points: list[tuple[int, float]] = []
    for each in trials:
        if each.status == "completed" and space.allows(each.metrics):
            value = each.metrics[objective]
            points.append((each.index, pick(value, points[-1][1]) if points else value))
    return [*points, (trials[-1].index, points[-1][1])] if points else []


def importance(
    space: SearchSpace, shares: Mapping[str, float], objective: str, labels: Mapping[str, str]
) -> str:
    """Bars of what an objective depends on, coloured by the way it goes with a parameter."""
    axes, figure = _axes(0.8 + 0.32 * len(shares))
    for path in sorted(shares, key=lambda path: abs(shares[path])):
        colour = BEST if shares[path] > 0 else ENDED
        axes.barh(
            labels[path],
            abs(shares[path]),
            color=OTHER if space.parameters[path].choice else colour,
        )
    _label(axes, "share; red: rises with the parameter, blue: falls, grey: has no order", "")
    return drawn(figure, f"Importance of parameters for {objective}")


def parallel(
    space: SearchSpace, trials: Sequence[Found], objective: str, labels: Mapping[str, str]
) -> str:
    """A line for each trial through all parameters to the objective; it is interrupted at those
    that do not matter for it."""
    known = [t for t in trials if objective in t.metrics]
    paths = [path for path, each in space.parameters.items() if each.kind != "fixed"]
    axes, figure = _axes(4.0, 3.0 + 1.3 * len(paths))
    values = [t.metrics[objective] for t in known]
    low, high = min(values), max(values)
    colours = _colours(low, high, space.objectives[objective])
    for found in sorted(known, key=lambda each: each.status == "completed"):
        value = found.metrics[objective]
        heights = [_height(space, path, found, known) for path in paths]
        heights.append((value - low) / ((high - low) or 1.0))
        done = found.status == "completed"
        look: dict[str, Any] = {"linewidth": 1.6} if done else {"linewidth": 0.8, "linestyle": ":"}
        axes.plot(heights, color=colours.to_rgba(value), marker=".", markersize=5, **look)
    for at, path in enumerate(paths):
        axes.axvline(at, color="0.8", linewidth=0.8, zorder=0)
        for height, text in _ticks(space.parameters[path], [t.overrides.get(path) for t in known]):
            axes.text(at, height, f" {text}", fontsize=7, va="center", color="0.35")
    axes.axvline(len(paths), color="0.8", linewidth=0.8, zorder=0)
    ticks = [*(labels[path] for path in paths), objective]
    axes.set_xticks(range(len(ticks)), ticks, fontsize=7, rotation=18, ha="right")
    axes.set_yticks([])
    axes.spines[:].set_visible(False)
    figure.colorbar(colours, ax=axes).set_label(objective, fontsize=8)
    return drawn(figure, f"Parallel coordinates by {objective} (dotted: did not complete)")


def front(space: SearchSpace, trials: Sequence[Found], best: Sequence[Found], pair: Any) -> str:
    """Two objectives of all trials that completed, and the front's among them."""
    one, other = pair
    axes, figure = _axes()
    done = [t for t in trials if _has(t, "completed", one)]
    axes.plot(
        [t.metrics[one] for t in done], [t.metrics[other] for t in done], "o", color=OTHER,
        markersize=5, label="completed",
    )  # fmt: skip
    points = sorted((t.metrics[one], t.metrics[other], t.index) for t in best)
    if points:
        where = "post" if space.objectives[one] == "minimize" else "pre"
        columns = _columns(points)[:2]
        axes.step(*columns, "o-", where=where, color=BEST, markersize=5, label="front")
    for *point, index in points:
        axes.annotate(f" {index}", point, fontsize=7)
    directions = {name: f"{name} ({space.objectives[name]})" for name in pair}
    _label(axes, directions[one], directions[other])
    return drawn(figure, f"Pareto front: {other} against {one}")


def curves(
    curves: Mapping[int, Sequence[tuple[int, float]]],
    trials: Sequence[Found],
    best: Sequence[Found],
) -> str:
    """Held-out loss against tokens of all trials, also of those that were stopped."""
    axes, figure = _axes(3.6)
    chosen, seen, losses = {each.index for each in best}, set(), []
    for each in sorted(trials, key=lambda t: t.index in chosen):
        points = [p for p in curves.get(each.index, ()) if math.isfinite(p[1])]
        if not points:
            continue
        end = "best" if each.index in chosen else each.status
        look = {"color": COLOURS.get(end, FAILED), "linewidth": 1.8 if end == "best" else 1.0}
        label = None if end in seen else _words(end)
        axes.plot(*_columns(points), marker=".", markersize=4, label=label, **look)
        axes.annotate(f" {each.index}", points[-1], fontsize=7, color=look["color"])
        seen.add(end)
        losses += [loss for _, loss in points]
    above = ""
    if losses and (top := fence(losses)) < max(losses):
        axes.set_ylim(top=top)
        above = f" (what is above {top:.3g} is left out)"
    _label(axes, "tokens", "held-out loss, nats")
    return drawn(figure, "Held-out loss of all trials" + above)


def fence(values: Sequence[float]) -> float:
    """What is above is far out, by Tukey's outer fence: three ranges of the middle half of the
    values above it (Exploratory Data Analysis, 1977)."""
    if len(values) < 4:
        return max(values)
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return third + 3 * (third - first)


# ----------------------------------------------------------------------------------------- pieces


def _axes(height: float = 3.2, width: float = 6.4) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.tick_params(labelsize=8)
    return axes, figure


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x, fontsize=8)
    axes.set_ylabel(y, fontsize=8)
    axes.grid(alpha=0.25)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=7, frameon=False)


def _columns(points: Sequence[tuple[Any, ...]]) -> list[tuple[Any, ...]]:
    return list(zip(*points, strict=True))


def _has(found: Found, end: str, objective: str) -> bool:
    return found.status == end and objective in found.metrics


def _words(end: str) -> str:
    return end.replace("_", " ")


def _colours(low: float, high: float, direction: str) -> Any:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    name = "viridis" if direction == "minimize" else "viridis_r"
    return ScalarMappable(Normalize(low, high if high > low else low + 1.0), name)


def _height(space: SearchSpace, path: str, found: Found, trials: Sequence[Found]) -> float:
    """Where on a parameter's axis a trial stands, 0 to 1; NaN where it does not matter."""
    value, parameter = found.overrides.get(path), space.parameters[path]
    if value is None:
        return math.nan
    if parameter.values:
        at = [repr(each) for each in parameter.values].index(repr(value))
        return at / (len(parameter.values) - 1)
    low, high = _limits(parameter, [t.overrides.get(path) for t in trials])
    return float((encoded(parameter, value) - low) / ((high - low) or 1.0))


def _limits(parameter: Parameter, values: Sequence[Any]) -> tuple[Number, Number]:
    known = parameter.bounds or [value for value in values if value is not None]
    return encoded(parameter, min(known)), encoded(parameter, max(known))


def _ticks(parameter: Parameter, values: Sequence[Any]) -> list[tuple[float, str]]:
    if parameter.values:
        last = len(parameter.values) - 1
        return [(at / last, str(each)) for at, each in enumerate(parameter.values)]
    known = parameter.bounds or [value for value in values if value is not None]
    return [(0.0, f"{min(known):.4g}"), (1.0, f"{max(known):.4g}")] if known else []

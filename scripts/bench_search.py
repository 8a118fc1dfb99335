"""How many trials Ax needs for what random search finds, against Optuna's TPE; and what ASHA saves.

For each function and seed: the best of N random points, the first of N trials of `AxSearcher` and
of TPE (optuna, Bergstra et al. 2011) that is as good, and what is best after N trials of each.
Functions: Branin (Dixon and Szegoe 1978), Hartmann-6 (Hartman 1973), Ackley of five dimensions
(Ackley 1987), and `surface`, learning curves of real tiny trials (see `record_surface.py`),
interpolated. ASHA runs on the surface, in virtual time, some trials beside each other.

    python scripts/bench_search.py [--trials 60] [--seeds 5] [--functions branin surface] [--whole]
    python scripts/bench_search.py --asha [--trials 60] [--seeds 20]

One table, or with `--json` the figures of all seeds; how it gets on is told on stderr.
"""

import argparse
import heapq
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import yaml
from ray.tune.schedulers import AsyncHyperBandScheduler
from ray.tune.search import Searcher
from scipy.interpolate import RegularGridInterpolator

from bitray.tuning import AxSearcher, SearchSpace

A = np.array([[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14],
              [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]])  # fmt: skip
P = 1e-4 * np.array([[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991],
                     [2348, 1451, 3522, 2883, 3047, 6650],
                     [4047, 8828, 8732, 5743, 1091, 381]])  # fmt: skip
ALPHA = np.array([1.0, 1.2, 3.0, 3.2])
WORKERS = 4
"""Trials beside each other, for ASHA."""
Point = np.ndarray


def branin(x: Point) -> float:
    """Minimum 0.397887."""
    b, c, t = 5.1 / (4 * math.pi**2), 5 / math.pi, 1 / (8 * math.pi)
    return float((x[1] - b * x[0] ** 2 + c * x[0] - 6) ** 2 + 10 * (1 - t) * math.cos(x[0]) + 10)


def hartmann6(x: Point) -> float:
    """Minimum -3.32237."""
    return float(-ALPHA @ np.exp(-(A * (x - P) ** 2).sum(1)))


def ackley5(x: Point) -> float:
    """Minimum 0."""
    ripples = math.exp(float(np.cos(2 * math.pi * x).mean()))
    return 20 + math.e - 20 * math.exp(-0.2 * math.sqrt(float((x**2).mean()))) - ripples


class Surface:
    """Recorded curves, linear between the points of the grid in the logarithms of its axes."""

    def __init__(self) -> None:
        table = json.loads(Path(__file__).with_name("surface.json").read_text())
        self.tokens, self.noise = table["tokens"], table["noise"]
        axes = [np.log10(values) for values in table["axes"].values()]
        self.bounds = [[float(axis[0]), float(axis[-1])] for axis in axes]
        self._at = RegularGridInterpolator(axes, np.array(table["loss"]))

    def curve(self, x: Point) -> list[float]:
        """Held-out losses of a trial at `tokens`."""
        low, high = np.array(self.bounds).T
        return [float(loss) for loss in self._at(np.clip(x, low, high))[0]]


@cache
def surface() -> Surface:
    return Surface()


Function = Callable[[Point], float]


def function(name: str) -> tuple[Function, list[list[float]]]:
    """What is minimised, and between which bounds."""
    if name == "surface":
        return lambda x: surface().curve(x)[-1], surface().bounds
    known: dict[str, tuple[Function, list[list[float]]]] = {
        "branin": (branin, [[-5.0, 10.0], [0.0, 15.0]]),
        "hartmann6": (hartmann6, [[0.0, 1.0]] * 6),
        "ackley5": (ackley5, [[-32.768, 32.768]] * 5),
    }
    return known[name]


FUNCTIONS = ("branin", "hartmann6", "ackley5", "surface")

# ------------------------------------------------------------------------------------- searchers


def by_ax(name: str, trials: int, seed: int, sobol: int) -> Iterator[float]:
    """Values of the trials of `AxSearcher`, in their order."""
    found, bounds = function(name)
    said = {
        "parameters": {f"x{n}": {"uniform": each} for n, each in enumerate(bounds)},
        "objectives": {"loss": "minimize"},
        "num_trials": trials,
        "sobol_trials": sobol,
        "seed": seed,
    }
    searcher = AxSearcher(SearchSpace.load_text(yaml.safe_dump(said), "bench"), ahead=0)
    for number in range(trials):
        while (sample := searcher.suggest(str(number))) is None:
            searcher.settle()
        if sample == Searcher.FINISHED:
            return
        value = found(np.array([sample[f"x{n}"] for n in range(len(bounds))]))
        searcher.on_trial_complete(str(number), {"loss": value})
        yield value


def by_tpe(name: str, trials: int, seed: int, _: int) -> Iterator[float]:
    """Values of the trials of Optuna with its default sampler."""
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    found, bounds = function(name)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed))
    for _n in range(trials):
        trial = study.ask()
        x = [trial.suggest_float(f"x{n}", *each) for n, each in enumerate(bounds)]
        value = found(np.array(x))
        study.tell(trial, value)
        yield value


def points(name: str, trials: int, seed: int) -> np.ndarray:
    """Drawn uniformly."""
    low, high = np.array(function(name)[1]).T
    return np.random.default_rng(seed).uniform(low, high, (trials, len(low)))


def compare(name: str, said: argparse.Namespace) -> dict[str, Any]:
    """What each searcher needs for random search's best of so many trials (None: more of them),
    and the best that each came to, by seed."""
    needed: dict[str, list[int | None]] = {"Ax": [], "TPE": []}
    ends: dict[str, list[float]] = {"random": [], "Ax": [], "TPE": []}
    for seed in range(said.seeds):
        chance = [function(name)[0](x) for x in points(name, said.trials, seed)]
        ends["random"].append(min(chance))
        for who, search in (("Ax", by_ax), ("TPE", by_tpe)):
            began, values = time.monotonic(), []
            for value in search(name, said.trials, seed, said.sobol):
                values.append(value)
                if value <= min(chance) and not said.whole:
                    break
            first = next((n + 1 for n, v in enumerate(values) if v <= min(chance)), None)
            needed[who].append(first)
            ends[who].append(min(values))
            print(f"{name} seed {seed}: random {min(chance):.4f} after {said.trials}; {who} as "
                  f"good after {first}, {min(values):.4f} after {len(values)} "
                  f"({time.monotonic() - began:.0f} s)", file=sys.stderr)  # fmt: skip
    return {"function": name, "trials": said.trials, "needed": needed, "best": ends}


def table(found: dict[str, Any], whole: bool) -> None:
    """Print the medians of a comparison."""
    name, trials = found["function"], found["trials"]
    for who, counts in found["needed"].items():
        median = statistics.median(math.inf if each is None else each for each in counts)
        print(f"{name}: {who} needs {median:g} of {trials} trials, median")
    if whole:
        best = ", ".join(f"{who} {statistics.median(v):.4f}" for who, v in found["best"].items())
        print(f"{name}: best after {trials} trials, median: {best}")


# ------------------------------------------------------------------------------------------ ASHA


def by_asha(xs: np.ndarray, grace: float, factor: float) -> tuple[float, int]:
    """The best of these trials, `WORKERS` at a time and stopped early, and tokens spent on all."""
    made, total = surface(), surface().tokens[-1]
    asha: Any = AsyncHyperBandScheduler(
        time_attr="tokens", metric="loss", mode="min", max_t=total,
        grace_period=math.floor(grace * total), reduction_factor=factor,
    )  # fmt: skip
    waiting, running = list(enumerate(xs)), []
    spent, best = 0, math.inf

    def begin(now: int) -> None:
        if waiting:
            number, x = waiting.pop(0)
            trial = SimpleNamespace(trial_id=str(number))
            asha.on_trial_add(None, trial)
            heapq.heappush(running, (now + made.tokens[0], number, 0, trial, made.curve(x)))

    for _ in range(WORKERS):
        begin(0)
    while running:
        now, number, at, trial, curve = heapq.heappop(running)
        told = {"tokens": made.tokens[at], "loss": curve[at]}
        action = asha.on_trial_result(None, trial, told)
        if at + 1 < len(curve) and action == "CONTINUE":
            step = made.tokens[at + 1] - made.tokens[at]
            heapq.heappush(running, (now + step, number, at + 1, trial, curve))
            continue
        spent += made.tokens[at]
        best = min(best, curve[-1]) if at + 1 == len(curve) else best
        begin(now)
    return best, spent


def stopping(said: argparse.Namespace) -> dict[str, Any]:
    """What ASHA costs, as a share of the same random trials without it, and by how much its best is
    worse; by seed."""
    ratios, losses = [], []
    for seed in range(said.seeds):
        xs = points("surface", said.trials, seed)
        whole = min(surface().curve(x)[-1] for x in xs)
        best, spent = by_asha(xs, said.grace, said.factor)
        ratios.append(spent / (said.trials * surface().tokens[-1]))
        losses.append(best - whole)
        print(f"seed {seed}: best {whole:.4f} at full cost, {best:.4f} at {ratios[-1]:.2f} of it",
              file=sys.stderr)  # fmt: skip
    return {"cost": ratios, "worse": losses, "noise": surface().noise}


def table_of_stopping(found: dict[str, Any]) -> None:
    """Print the medians."""
    worse, noise = found["worse"], found["noise"]
    within = sum(each <= noise for each in worse)
    cost, lost = statistics.median(found["cost"]), statistics.median(worse)
    print(f"ASHA: {cost:.2f} of the cost, {lost:+.4f} nats, medians; within the noise of {noise} "
          f"in {within} of {len(worse)}")  # fmt: skip


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--sobol", type=int, default=12, help="points that Ax spreads evenly")
    parser.add_argument("--functions", nargs="+", default=FUNCTIONS, choices=FUNCTIONS)
    parser.add_argument("--whole", action="store_true", help="go on to the last trial")
    parser.add_argument("--asha", action="store_true", help="early stopping instead")
    parser.add_argument("--grace", type=float, default=0.25)
    parser.add_argument("--factor", type=float, default=3.0)
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    said = parser.parse_args()
    found = [stopping(said)] if said.asha else [compare(name, said) for name in said.functions]
    if said.json:
        print(json.dumps(found))
        return
    for each in found:
        table_of_stopping(each) if said.asha else table(each, said.whole)


if __name__ == "__main__":
    main()

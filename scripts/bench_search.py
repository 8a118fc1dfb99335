"""How many trials Ax needs for what random search finds, on published synthetic functions.

Branin (Dixon and Szegoe 1978) and Hartmann-6 (Hartman 1973): for each seed the best of N random
points, and the first of N trials of `AxSearcher` that is as good. Trials are given one at a time.

    python scripts/bench_search.py [--trials 60] [--seeds 3] [--functions branin]
"""

import argparse
import math
import statistics
import time
from collections.abc import Callable

import numpy as np
import yaml
from ray.tune.search import Searcher

from bitray.tuning import AxSearcher, SearchSpace

A = np.array([[10, 3, 17, 3.5, 1.7, 8], [0.05, 10, 17, 0.1, 8, 14],
              [3, 3.5, 1.7, 10, 17, 8], [17, 8, 0.05, 10, 0.1, 14]])  # fmt: skip
P = 1e-4 * np.array([[1312, 1696, 5569, 124, 8283, 5886], [2329, 4135, 8307, 3736, 1004, 9991],
                     [2348, 1451, 3522, 2883, 3047, 6650],
                     [4047, 8828, 8732, 5743, 1091, 381]])  # fmt: skip
ALPHA = np.array([1.0, 1.2, 3.0, 3.2])


def branin(x: np.ndarray) -> float:
    """Minimum 0.397887."""
    b, c, t = 5.1 / (4 * math.pi**2), 5 / math.pi, 1 / (8 * math.pi)
    return float((x[1] - b * x[0] ** 2 + c * x[0] - 6) ** 2 + 10 * (1 - t) * math.cos(x[0]) + 10)


def hartmann6(x: np.ndarray) -> float:
    """Minimum -3.32237."""
    return float(-ALPHA @ np.exp(-(A * (x - P) ** 2).sum(1)))


FUNCTIONS: dict[str, tuple[Callable[[np.ndarray], float], list[list[float]]]] = {
    "branin": (branin, [[-5.0, 10.0], [0.0, 15.0]]),
    "hartmann6": (hartmann6, [[0.0, 1.0]] * 6),
}


def by_ax(name: str, trials: int, seed: int, wanted: float) -> list[float]:
    """Values of the trials in their order, up to the first as good as `wanted`."""
    function, bounds = FUNCTIONS[name]
    said = {
        "parameters": {f"x{n}": {"uniform": each} for n, each in enumerate(bounds)},
        "objectives": {"loss": "minimize"},
        "num_trials": trials,
        "sobol_trials": 12,
        "seed": seed,
    }
    searcher = AxSearcher(SearchSpace.load_text(yaml.safe_dump(said), "bench"), ahead=0)
    values: list[float] = []
    while min(values, default=math.inf) > wanted:
        sample = searcher.suggest(str(len(values)))
        if sample == Searcher.FINISHED:
            break
        if sample is None:
            searcher.settle()
            continue
        value = function(np.array([sample[f"x{n}"] for n in range(len(bounds))]))
        searcher.on_trial_complete(str(len(values)), {"loss": value})
        values.append(value)
    return values


def by_chance(name: str, trials: int, seed: int) -> list[float]:
    """Values of points drawn uniformly."""
    function, bounds = FUNCTIONS[name]
    low, high = np.array(bounds).T
    return [function(x) for x in np.random.default_rng(seed).uniform(low, high, (trials, len(low)))]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--trials", type=int, default=60)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--functions", nargs="+", default=list(FUNCTIONS), choices=FUNCTIONS)
    said = parser.parse_args()
    for name in said.functions:
        needed = []
        for seed in range(said.seeds):
            began, best = time.monotonic(), min(by_chance(name, said.trials, seed))
            values = by_ax(name, said.trials, seed, best)
            needed.append(len(values) if min(values) <= best else math.inf)
            seconds = time.monotonic() - began
            print(f"{name} seed {seed}: random {best:.4f} after {said.trials}; "
                  f"Ax {min(values):.4f} after {len(values)} ({seconds:.0f} s)",
                  flush=True)  # fmt: skip
        print(f"{name}: {statistics.median(needed)} of {said.trials} trials at the median")


if __name__ == "__main__":
    main()

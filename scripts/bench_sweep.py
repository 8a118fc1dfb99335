"""What a sweep costs beyond its trials: eight equal ones of the demo, two at a time.

Ideal is four times the median trial; the wall time counts from the start of the first trial to the
end of the last, so that what comes before (Ray, the common stages) is left out, but not what lies
between trials: candidates, processes, resources that are returned.

    python scripts/bench_sweep.py [--steps 30] [--json] [overrides]
"""

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import yaml

from bitray.tuning import SearchSpace
from bitray.tuning.sweep import sweep

SLOTS, TRIALS = 2, 8
RATE = "stages.stage2.optimizer.lr"


def times(folder: Path) -> list[tuple[float, float]]:
    """Beginning and end of every trial, as Tune has them."""
    found = []
    for file in folder.glob("*/result.json"):
        last = json.loads(file.read_text().splitlines()[-1])
        found.append((last["timestamp"] - last["time_total_s"], last["timestamp"]))
    return sorted(found)


def figures(found: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """Seconds from the first beginning to the last end, what they would be at best, their ratio."""
    began = found[0][0]
    median = statistics.median(end - begin for begin, end in found)
    wall, ideal = max(end for _, end in found) - began, len(found) / SLOTS * median
    trials = [[begin - began, end - began] for begin, end in found]
    return {"trials": trials, "median": median, "wall": wall, "ideal": ideal, "ratio": wall / ideal}


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--steps", type=int, default=30, help="of Stage 2, in every trial")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    parser.add_argument("words", nargs="*")
    said = parser.parse_intermixed_args()
    demo = yaml.safe_load((Path(__file__).parents[1] / "search_spaces" / "demo.yaml").read_text())
    demo |= {"start": [], "scheduler": {"type": "none"}, "sobol_trials": TRIALS // 2}
    demo["parameters"] = {RATE: demo["parameters"][RATE]}
    demo |= {"num_trials": TRIALS, "max_concurrent": SLOTS}
    demo["budget"]["stage2"]["steps"] = said.steps
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
        path = Path(folder, "equal.yaml")
        path.write_text(yaml.safe_dump(demo))
        print(sweep(SearchSpace.load(str(path), [*said.words, f"output_dir={folder}"]), "equal"))
        found = times(Path(folder, "equal", "tune"))
    assert len(found) == TRIALS
    told = figures(found)
    if said.json:
        print(json.dumps(told))
        return
    for begin, end in told["trials"]:
        print(f"  {begin:7.1f} s - {end:7.1f} s")
    print(f"wall {told['wall']:.1f} s, ideal {told['ideal']:.1f} s "
          f"({TRIALS // SLOTS} x {told['median']:.1f}): {told['ratio']:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()

"""What a sweep costs beyond its trials: eight equal ones of the demo, two at a time.

Ideal is four times the median trial; the wall time counts from the start of the first trial to the
end of the last, so that what comes before (Ray, the common stages) is left out, but not what lies
between trials: candidates, processes, resources that are returned.

    python scripts/bench_sweep.py [--steps 30] [overrides]
"""

import argparse
import json
import statistics
import tempfile
from pathlib import Path

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


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--steps", type=int, default=30, help="of Stage 2, in every trial")
    parser.add_argument("words", nargs="*")
    said = parser.parse_intermixed_args()
    demo = yaml.safe_load((Path(__file__).parents[1] / "search_spaces" / "demo.yaml").read_text())
    demo |= {"start": [], "scheduler": {"type": "none"}, "sobol_trials": TRIALS // 2}
    demo["parameters"] = {RATE: demo["parameters"][RATE]}
    demo |= {"num_trials": TRIALS, "max_concurrent": SLOTS}
    demo["budget"]["stage2"]["steps"] = said.steps
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "equal.yaml")
        path.write_text(yaml.safe_dump(demo))
        print(sweep(SearchSpace.load(str(path), [*said.words, f"output_dir={folder}"]), "equal"))
        found = times(Path(folder, "equal", "tune"))
    assert len(found) == TRIALS
    median = statistics.median(end - begin for begin, end in found)
    wall = max(end for _, end in found) - found[0][0]
    ideal = TRIALS / SLOTS * median
    for begin, end in found:
        print(f"  {begin - found[0][0]:7.1f} s - {end - found[0][0]:7.1f} s")
    print(f"wall {wall:.1f} s, ideal {ideal:.1f} s ({TRIALS // SLOTS} x {median:.1f}): "
          f"{wall / ideal:.3f}")  # fmt: skip


if __name__ == "__main__":
    main()

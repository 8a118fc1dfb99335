"""Search for the best settings of a run: whole trials beside each other, chosen by Ax.

examples:
  python jobs/tune.py search_spaces/demo.yaml
      8 tiny trials on the CPUs at hand; the same command again continues
  python jobs/tune.py search_spaces/stage1_9_stage2.yaml model=qwen3_0.6b num_trials=40
      words are settings of the space, or of the run that all trials share
  python jobs/tune.py search_spaces/demo.yaml --analyze-only runs/demo
      write the report of a sweep again
"""

import argparse
import sys
from pathlib import Path

from bitray.pipeline.cli import Arguments, job
from bitray.tuning.space import SearchSpace


def main(arguments: Arguments) -> None:
    path, *words = arguments.words or [""]
    space = SearchSpace.load(path or None, words)
    from bitray.tuning import sweep

    if arguments.dry_run:
        print(sweep.outline(space))
    elif folder:
        print(sweep.analyze(space, folder))
    else:
        print(sweep.sweep(space, Path(path).stem))


if __name__ == "__main__":
    own = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    own.add_argument("--analyze-only")
    said, rest = own.parse_known_args()
    folder, sys.argv[1:] = said.analyze_only, rest
    job(main, __doc__, SearchSpace, dry_run=True)

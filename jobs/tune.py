"""Search for the best settings of a run: whole trials beside each other, chosen by Ax.

examples:
  python jobs/tune.py search_spaces/demo.yaml
      8 tiny trials on the CPUs at hand; the same command again continues
  python jobs/tune.py search_spaces/stage1_9_stage2.yaml model=qwen3_0.6b num_trials=40
      words are settings of the space, or of the run that all trials share
  python jobs/tune.py --analyze-only runs/demo
      write the report of a sweep again
"""

from pathlib import Path

from bitray.pipeline.cli import Arguments, job
from bitray.settings import UserError
from bitray.tuning.space import SearchSpace


def main(arguments: Arguments) -> None:
    from bitray.tuning import sweep

    if arguments.analyze_only:
        if arguments.words:
            raise UserError(
                f"{arguments.words[0]}: --analyze-only reads the space in the sweep's own folder; "
                "leave all other words out"
            )
        print(sweep.analyze(arguments.analyze_only))
        return
    if arguments.config:
        raise UserError(
            f"--config {arguments.config}: what trials share stands under run in the file of the "
            "space; put it there, or say it in words"
        )
    path, *words = arguments.words or [""]
    space = SearchSpace.load(path or None, words)
    if arguments.dry_run:
        print(sweep.outline(space))
    else:
        print(sweep.sweep(space, Path(path).stem))


if __name__ == "__main__":
    job(main, __doc__, SearchSpace, dry_run=True, analyze_only=True)

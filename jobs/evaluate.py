"""Held-out loss and perplexity of a checkpoint, per domain, at strength 1.

examples:
  python jobs/evaluate.py checkpoint=runs/bitray_demo
      the last stage of a run, on the held-out rows that it was prepared with
  python jobs/evaluate.py checkpoint=HuggingFaceTB/SmolLM2-135M data=local \\
      data.sources.mine.path=/data/mine max_seq_length=512
      any model, any data
"""

from bitray.pipeline.cli import Arguments, job
from bitray.pipeline.inspect import Evaluation, evaluate_checkpoint


def main(arguments: Arguments) -> None:
    print(evaluate_checkpoint(Evaluation.load(arguments.config, arguments.words)).text())


if __name__ == "__main__":
    job(main, __doc__, Evaluation)

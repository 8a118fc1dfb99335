"""Held-out loss and perplexity of a checkpoint, per domain, at strength 1.

examples:
  python jobs/evaluate.py checkpoint=runs/bitray_demo
      the last stage of a run, on the held-out rows that it was prepared with
  python jobs/evaluate.py checkpoint=HuggingFaceTB/SmolLM2-135M data=local \\
      data.sources.mine.path=/data/mine max_seq_length=512
      any model, any data
  python jobs/evaluate.py checkpoint=runs/bitray_demo tasks.mood.path=mood.jsonl \\
      tasks.mood.choices='[" good", " bad"]' tasks.sums.path=sums.jsonl
      {"prompt": ..., "completion": ...} a line: accuracy among choices, else ROUGE of written text
  python jobs/evaluate.py checkpoint=runs/bitray_demo tasks=downstream
      GLUE and CNN-DailyMail, of the Hub
  python jobs/evaluate.py checkpoint=runs/bitray_demo lm_eval.tasks='[arc_easy]'
      by the library lm-eval, if it is installed
"""

from bitray.pipeline.cli import Arguments, job
from bitray.pipeline.requests import Evaluation


def main(arguments: Arguments) -> None:
    request = Evaluation.load(arguments.config, arguments.words)
    from bitray.pipeline.inspect import evaluate_checkpoint

    print("\n\n".join(table.text() for table in evaluate_checkpoint(request)))


if __name__ == "__main__":
    job(main, __doc__, Evaluation)

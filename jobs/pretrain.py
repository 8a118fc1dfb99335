"""Turn a language model ternary: prepare data, run the stages, evaluate, report, export.

examples:
  python jobs/pretrain.py
      the demo: a small model on text made on the spot, minutes on two CPUs
  python jobs/pretrain.py model=smollm2_135m pipeline=standard scaling=single_gpu \\
      data=local data.sources.books.path=/data/books stages.stage2.max_steps=2000
      your own text, a model of the Hugging Face Hub, one GPU
  python jobs/pretrain.py --dry-run stages.stage2.optimizer.lr=2e-3
      check the whole configuration and print the plan, without training
  python jobs/pretrain.py model=smollm2_135m pipeline=standard training.optimizer.type=muonclip \\
      stages.stage1_9.optimizer.lr=3e-3 stages.stage2.optimizer.weight_decay=0
      another optimizer: it begins with its own defaults, the same in every stage
  ray job submit --working-dir . -- python jobs/pretrain.py scaling=fsdp_multi
      the same on a cluster
"""

import sys

import bitray
from bitray.pipeline.cli import Arguments, job


def main(arguments: Arguments) -> None:
    config = bitray.Config.load(arguments.config, arguments.words)
    if arguments.dry_run:
        from bitray.pipeline.plan import plan

        print(plan(config))
        return
    result = bitray.run(config)
    print(result)
    sys.exit(130 if result.stopped else 0)


if __name__ == "__main__":
    job(main, __doc__, bitray.Config, dry_run=True)

"""A run of 20 steps through everything: three checkpoints, influence, trackers, a loss that falls.

The exit code is 0 if all of it is as it should be; else one sentence says what is not.

examples:
  python jobs/smoke.py combo=ce_only workers=2
      the demo's model on text made on the spot; also dlm, distill, bitdistill and lrc
  python jobs/smoke.py combo=bitdistill workers=1 model=smollm2_135m scaling.use_gpu=true
      words of a run go before the test's own
  python scripts/submit.py jobs/smoke.py combo=lrc workers=2
      on a cluster
"""

from bitray import Config
from bitray.pipeline.cli import Arguments, job


def main(arguments: Arguments) -> None:
    from bitray.pipeline.smoke import smoke

    print(smoke(arguments.config, arguments.words))


if __name__ == "__main__":
    job(main, __doc__, Config)

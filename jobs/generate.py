"""Text from a checkpoint.

examples:
  python jobs/generate.py checkpoint=runs/bitray_demo prompt="def __init__(self"
  python jobs/generate.py checkpoint=runs/bitray_demo/stage0_checkpoint prompt="The" \\
      sampling.temperature=0 sampling.max_new_tokens=100
"""

from bitray.pipeline.cli import Arguments, job
from bitray.pipeline.requests import Generation


def main(arguments: Arguments) -> None:
    request = Generation.load(arguments.config, arguments.words)
    from bitray.pipeline.inspect import generate_text

    print(generate_text(request))


if __name__ == "__main__":
    job(main, __doc__, Generation)

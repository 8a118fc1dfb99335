"""Tokenise and pack data once, as a Ray Data job; a second run finds it done.

examples:
  python jobs/prepare.py data=embedded
  python jobs/prepare.py model=smollm2_135m pipeline=standard data=local \\
      data.sources.books.path=/data/books data.sources.code.path='/data/code/*.jsonl.gz' \\
      data.sources.code.columns=[content]
"""

from bitray import Config
from bitray.pipeline.cli import Arguments, job
from bitray.pipeline.run import prepare_only


def main(arguments: Arguments) -> None:
    print(prepare_only(Config.load(arguments.config, arguments.words)).text())


if __name__ == "__main__":
    job(main, __doc__, Config)

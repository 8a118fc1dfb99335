"""Tokenise and pack data once, as a Ray Data job; a second run finds it done.

examples:
  python jobs/prepare.py data=embedded
  python jobs/prepare.py model=smollm2_135m pipeline=standard data=local \\
      data.sources.books.path=/data/books data.sources.code.path='/data/code/*.jsonl.gz' \\
      data.sources.code.columns=[content]
  python jobs/prepare.py data=embedded --preview 2
      two rows of every source as training sees them: documents, labels, text
"""

from bitray import Config
from bitray.pipeline.cli import Arguments, job


def main(arguments: Arguments) -> None:
    config = Config.load(arguments.config, arguments.words)
    from bitray.pipeline.folders import located
    from bitray.pipeline.inspect import preview
    from bitray.pipeline.material import at_commit
    from bitray.pipeline.run import prepare_only

    config = at_commit(located(config))
    print(prepare_only(config).text())
    if arguments.preview:
        print(preview(config, arguments.preview))


if __name__ == "__main__":
    job(main, __doc__, Config, preview=True)

"""The command line that all jobs share: flags, `key=value` words, help, and readable failures."""

import argparse
import errno
import logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NoReturn

from bitray.settings import Composed, UserError, nearest


class _Parser(argparse.ArgumentParser):
    """Tells what is wrong in one sentence, as settings do."""

    def error(self, message: str) -> NoReturn:
        known = [flag for action in self._actions for flag in action.option_strings]
        what, _, word = message.partition("unrecognized arguments: ")
        if not what and word:
            word = word.split()[0]
            message = f"{word}: there is no such flag{nearest(word, known)}; see --help"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Arguments:
    """What was said on the command line."""

    config: str | None
    words: list[str]
    dry_run: bool = False
    preview: int | None = None
    analyze_only: str | None = None


def job(main: Callable[[Arguments], None], doc: str, root: type[Composed], **flags: bool) -> None:
    """Run a job: exit 0, 2 with one readable message for what a user can put right, 130 on Ctrl-C.

    `flags` says which of `dry_run`, `preview` and `analyze_only` the job knows; `doc` is its help.
    """
    arguments = parsed(sys.argv[1:], doc, _groups(root), **flags)
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it counts its retries, twice each
    if not sys.stderr.isatty():
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        main(arguments)
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        said = told(error)
        if said is None:
            raise
        print(f"error: {said}", file=sys.stderr)
        sys.exit(2)


def parsed(
    words: Sequence[str],
    doc: str = "",
    epilog: str = "",
    *,
    dry_run: bool = False,
    preview: bool = False,
    analyze_only: bool = False,
) -> Arguments:
    """The command line of a job that knows these flags."""
    parser = _Parser(
        allow_abbrev=False,
        description=doc,
        epilog=epilog,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", metavar="FILE", help="a YAML file of settings")
    if dry_run:
        parser.add_argument("--dry-run", action="store_true", help="check and plan, then stop")
    if preview:
        shown = "show N rows of every source"
        parser.add_argument("--preview", type=_number_of_rows, metavar="N", help=shown)
    if analyze_only:
        parser.add_argument(
            "--analyze-only", metavar="SWEEP", help="write the report of a sweep's folder again"
        )
    parser.add_argument("words", nargs="*", metavar="group=name | path.to.key=value")
    return Arguments(**vars(parser.parse_intermixed_args(words)))


def _number_of_rows(word: str) -> int:
    if not word.isdecimal() or not int(word):
        raise argparse.ArgumentTypeError(f"'{word}' is no number of rows; give 1 or more")
    return int(word)


_PLACES = {errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.ENOTDIR, errno.EEXIST}
"""What is wrong with a place that a user chose to write to."""


def told(error: BaseException) -> str | None:
    """What to tell of an error that a user can put right, wherever it was raised; None for all
    others."""
    return next(filter(None, map(_sentence, causes(error))), None)


def _sentence(error: BaseException) -> str | None:
    if isinstance(error, OSError) and error.errno in _PLACES and error.filename:
        return f"{error.filename}: {error.strerror}"
    return str(error) if isinstance(error, UserError) else None


def causes(error: BaseException) -> Iterator[BaseException]:
    """An exception and what it wraps, also across Ray's processes; of what Ray wraps in an account
    of where it was raised, not the account."""
    if not isinstance(getattr(error, "cause", None), BaseException):
        yield error
    inner = [
        error.__cause__,
        *(getattr(error, name, None) for name in ("cause", "controller_failure")),
    ]
    inner += list(getattr(error, "worker_failures", {}).values())
    for each in inner:
        if isinstance(each, BaseException) and each is not error:
            yield from causes(each)


def _groups(root: type[Composed]) -> str:
    defaults = set(root.default_groups.values())
    wanted = {*root.default_groups, *(g for g, s in root.slots.items() if s in root.default_groups)}
    wanted |= set(root.model_fields)
    lines = ["groups (* is the default):"] if wanted & set(root.groups()) else []
    for group, choices in root.groups().items():
        if group not in wanted:
            continue
        lines.append(f"  {group}=")
        for name, about in choices.items():
            mark = "*" if f"{group}/{name}" in defaults else " "
            lines.append(f"   {mark}{name:<22} {about}")
    lines.append(f"settings: {', '.join(root.model_fields)}, and any path below them")
    return "\n".join(lines)

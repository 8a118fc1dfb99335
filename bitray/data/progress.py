"""How far preparing has come: a bar on a terminal, else a line now and then."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import Protocol, TypeVar, runtime_checkable

from tqdm import tqdm

SECONDS = 2.0
"""Between two lines."""


@runtime_checkable
class Done(Protocol):
    """A piece of work that is done."""

    @property
    def tokens(self) -> int:
        """Its tokens."""
        ...


Result = TypeVar("Result", bound=Done)


def reported(results: Iterable[Result], total: int) -> Iterator[Result]:
    """The results as they come, `total` of them; how fast that goes is said beside it."""
    return _bar(results, total) if sys.stderr.isatty() else _lines(results, total)


def _bar(results: Iterable[Result], total: int) -> Iterator[Result]:
    start, tokens = time.monotonic(), 0
    with tqdm(total=total, desc="prepare", unit="unit", dynamic_ncols=True) as bar:
        for result in results:
            tokens += result.tokens
            rate = tokens / max(1e-9, time.monotonic() - start)
            bar.set_postfix_str(f"{tokens:,} tokens, {rate:,.0f} tokens/s", refresh=False)
            bar.update()
            yield result


def _lines(results: Iterable[Result], total: int) -> Iterator[Result]:
    start = said = time.monotonic()
    tokens = 0
    for number, result in enumerate(results, start=1):
        tokens += result.tokens
        now = time.monotonic()
        if now - said > SECONDS or number == total:
            said, rate = now, tokens / (now - start)
            left = (now - start) / number * (total - number)
            print(
                f"prepare: {number}/{total} units, {tokens:,} tokens, {rate:,.0f} tokens/s, "
                f"{left:.0f} s left",
                flush=True,
            )
        yield result

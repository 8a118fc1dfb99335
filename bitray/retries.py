"""Patience with object storage: which of its errors pass, and how long a call is tried again.

Waits grow and are jittered, so that many workers do not come back at the same moment. What is
missing or forbidden is told at once: asking again would not change it.
"""

import re
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay
from tenacity.wait import wait_random_exponential

from bitray.settings import Passing

_growing = wait_random_exponential(multiplier=0.2, max=20.0)
_FORBIDDEN = re.compile(
    r"ACCESS_?DENIED|FORBIDDEN|UNAUTHORIZED|UNAUTHENTICATED|PERMISSION_DENIED|CREDENTIAL|SIGNATURE"
    r"|EXPIRED|INVALID_(ACCESS_KEY|CLIENT_TOKEN)|UNRECOGNIZED_CLIENT|HTTP (status|code) 40[13]",
    re.IGNORECASE,
)
_FINAL = re.compile(r"NO_SUCH|NOT_FOUND|HTTP (status|code) (400|404|412)", re.IGNORECASE)
_PLACE = (FileNotFoundError, FileExistsError, IsADirectoryError, NotADirectoryError)
PATIENCE_S = 600.0
_patience = PATIENCE_S
_failing: dict[int, str] = {}
"""Thread -> the error of the call that it is trying again."""

T = TypeVar("T")


class StorageGone(Passing):
    """Storage has not answered for as long as anybody was to wait for it."""


@contextmanager
def patient(seconds: float) -> Iterator[None]:
    """Inside, and in all threads of this process, calls are tried again for so long."""
    global _patience  # noqa: PLW0603 - one process has one patience
    before, _patience = _patience, seconds
    try:
        yield
    finally:
        _patience = before


def failing() -> str | None:
    """The error of some call that is being tried again at this moment; None if all is well."""
    return next(iter(list(_failing.values())), None)


def retried(uri: str, call: Callable[[], T]) -> T:
    """The result of `call`, which asks storage for `uri`.

    Raises `StorageGone` after the patience has run out, `Passing` where access is denied, and
    any other error that does not pass as it is.
    """
    began, thread, patience = time.monotonic(), threading.get_ident(), _patience

    def note(state: RetryCallState) -> None:
        assert state.outcome is not None
        reason = _first_line(state.outcome.exception())
        if not _failing:
            warnings.warn(f"{uri}: {reason}; trying again", stacklevel=4)
        _failing[thread] = reason

    def wait(state: RetryCallState) -> float:  # the last try is made when patience ends
        return min(_growing(state), max(patience - (state.seconds_since_start or 0.0), 0.0))

    attempts = Retrying(
        retry=retry_if_exception(may_pass),
        stop=stop_after_delay(patience),
        wait=wait,
        before_sleep=note,
        reraise=True,
    )
    try:
        return attempts(call)
    except OSError as error:
        reason = _first_line(error)
        if may_pass(error):
            waited = time.monotonic() - began
            raise StorageGone(
                f"{uri}: the storage has not answered for {waited:.0f} s ({reason}); "
                "when it does, the same command continues"
            ) from error
        if _FORBIDDEN.search(reason):
            raise Passing(
                f"{uri}: access is denied ({reason}); renew the credentials, and the same command "
                "continues"
            ) from error
        raise
    finally:
        _failing.pop(thread, None)


def may_pass(error: BaseException) -> bool:
    """Whether an error may be gone at the next try; errors with a number are this machine's."""
    if not isinstance(error, OSError) or isinstance(error, _PLACE) or error.errno is not None:
        return False
    text = _first_line(error)
    return not (_FORBIDDEN.search(text) or _FINAL.search(text))


def _first_line(error: BaseException | None) -> str:
    return str(error).partition("\n")[0]

"""Ctrl-C and SIGTERM: the first asks for an orderly end, the second ends at once."""

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any, NoReturn, TypeVar

import psutil

from bitray import storage
from bitray.pipeline.saving import STOP

T = TypeVar("T")


@contextmanager
def interruptible(said: str, stop: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Inside, the first signal tells `said` and calls `stop`. Gives whether it came."""
    asked = False

    def ask(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            end_at_once()
        asked = True
        print(f"\n{said}; once more stops at once", flush=True)
        stop()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def end_at_once() -> NoReturn:
    """Exit with all processes below this one; agents of a Ray that it started would stay."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()
    os._exit(130)


@contextmanager
def stoppable(run_dir: str) -> Iterator[None]:
    """Inside, an interrupt is passed on to the workers through the run's folder."""
    flag = storage.join(run_dir, STOP)
    if storage.exists(flag):
        storage.remove(flag)
    if threading.current_thread() is not threading.main_thread():
        yield  # a trial of a sweep: signals belong to whoever drives it
        return

    def stop() -> None:
        storage.write_text(flag, "asked to stop\n")

    with interruptible("stopping after this step, with a checkpoint", stop) as asked:
        try:
            yield
        finally:
            if asked() and storage.exists(flag):
                storage.remove(flag)


def in_thread(call: Callable[[], T]) -> T:
    """The result of `call`, run in a thread: Ray Train then leaves our signal handlers alone, and
    the main thread hears signals while it waits."""
    answers: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(call())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="fit")
    thread.start()
    while thread.is_alive():
        thread.join(0.2)
    if errors:
        raise errors[0]
    return answers[0]

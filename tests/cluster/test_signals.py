"""Signals to a driver with a Ray of its own: exit codes, and nobody is left."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from machines import wait_for
from road import drive

pytestmark = [pytest.mark.ray, pytest.mark.slow]


@pytest.fixture
def driven(
    words: Callable[..., Sequence[str]], tmp_path: Path, request: pytest.FixtureRequest
) -> Iterator[tuple[subprocess.Popen[bytes], Path, list[psutil.Process]]]:
    """A driver in mid-stage, its log, and all processes below it."""
    name = f"signalled_{request.node.callspec.id}"
    said = [*words(name), "scaling.num_workers=1", "scaling.cpus_per_worker=0.5",
            "scaling.worker_labels={}", "scaling.data_labels={}"]  # fmt: skip
    log = tmp_path / "log.txt"
    driver = drive(said, log)
    wait_for(lambda: "step 10/" in log.read_text(), why=f"step 10: {log}")
    yield driver, log, psutil.Process(driver.pid).children(recursive=True)
    if driver.poll() is None:
        os.killpg(driver.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("numbers", "checkpoint"),
    [((signal.SIGTERM,), True), ((signal.SIGINT, signal.SIGINT), False)],
    ids=["term", "twice"],
)
def test_exit_130_and_no_orphans(
    driven: tuple[subprocess.Popen[bytes], Path, list[psutil.Process]],
    numbers: tuple[int, ...],
    checkpoint: bool,
) -> None:
    driver, log, below = driven
    began = time.monotonic()
    for number in numbers:  # a terminal interrupts the group, others end the driver
        (os.killpg if number == signal.SIGINT else os.kill)(driver.pid, number)
        wait_for(lambda: "once more stops at once" in log.read_text(), 30, "it is heard")
    assert driver.wait(120) == 130, log.read_text()[-2000:]
    print(f"\n{numbers}: exit after {time.monotonic() - began:.1f} s")
    said = log.read_text()
    assert ("stopped in stage0; the same command continues it" in said) == checkpoint
    assert "Traceback" not in said
    assert checkpoint or time.monotonic() - began < 10, "at once"
    wait_for(lambda: not [p for p in below if p.is_running() and p.status() != "zombie"], 60,
             "its processes end")  # fmt: skip

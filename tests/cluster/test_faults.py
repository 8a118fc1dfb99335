"""Workers that hang, lag or have no memory left, and a job that is stopped, on real nodes."""

import re
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import psutil
import pytest
from conftest import HEAD, WORKER
from machines import Machines, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def machines() -> Iterator[Machines]:
    """As elsewhere, but that tensors are given back to the system, so that its limits are felt."""
    found = Machines(HEAD, WORKER, WORKER, MALLOC_MMAP_THRESHOLD_="65536")
    yield found
    found.close()


def begun(found: Any, step: int) -> int:
    """Wait until a run has reached a step; where it is."""
    wait_for(lambda: found.reached() >= step, why=f"step {step}")
    return int(found.reached())


def start(machines: Machines, said: Sequence[str]) -> tuple[Any, str]:
    from road import Road

    from bitray import Config

    return Road(Config.load(overrides=said)), machines.submit("jobs/pretrain.py", list(said))


def test_a_hung_worker_is_found_and_all_start_again(
    machines: Machines, words: Callable[..., Sequence[str]]
) -> None:
    """A stopped process: it does not even watch itself."""
    found, submission = start(machines, words("hung", "scaling.hang_seconds=5"))
    at, stopped = begun(found, 8), time.time()
    machines.processes("RayTrainWorker")[0].send_signal(signal.SIGSTOP)
    wait_for(lambda: "no step for" in machines.logs(submission), why="it is noticed")
    noticed = time.time() - stopped
    begun(found, at + 3)
    print(f"\nhang noticed after {noticed:.1f} s, new step after {time.time() - stopped:.1f} s")
    logs = machines.succeeded(submission)
    assert "waiting for other workers in" in logs and "the workers are started again" in logs
    (file,) = (found.folder / "stacks").iterdir()
    assert "loop.py" in file.read_text()
    steps = [line["step"] for line in found.lines("stage0") if "train/loss" in line]
    assert steps == list(range(1, 41))
    machines.clean()


def test_a_slow_worker_is_named(machines: Machines, words: Callable[..., Sequence[str]]) -> None:
    heavier = ["training.batch_size=16", "training.influence.enabled=false"]
    found, submission = start(machines, words("slow", "training.max_steps=80", *heavier))
    at, over = begun(found, 12), threading.Event()
    victim = machines.processes("RayTrainWorker")[0]

    def slow() -> None:
        """It runs for a quarter of the time."""
        while not over.is_set():
            victim.suspend()
            time.sleep(0.09)
            victim.resume()
            time.sleep(0.03)

    thread = threading.Thread(target=slow)
    thread.start()
    said = re.compile(r"step (\d+): worker \d is slow")
    try:
        told = wait_for(lambda: said.search(machines.logs(submission)), 300, "it is named")
    finally:
        over.set()
        thread.join()
    named = int(told[1])
    print(f"\nslow from step {at} on, named at step {named}")
    assert named - at <= 25  # 20 of its own, and those until it was slowed
    machines.succeeded(submission)


def test_a_worker_without_memory_stops_the_run_with_advice(
    machines: Machines, words: Callable[..., Sequence[str]]
) -> None:
    found, submission = start(machines, words("memory", "training.batch_size=16"))
    begun(found, 8)
    victim, began = machines.processes("RayTrainWorker")[0], time.time()
    victim.rlimit(psutil.RLIMIT_DATA, (victim.memory_info().data + 2_000_000,) * 2)
    assert machines.finished(submission) == "FAILED"
    print(f"\nout of memory: the run ended after {time.time() - began:.1f} s")
    logs = machines.logs(submission)
    (told,) = [line for line in logs.splitlines() if line.startswith("error: ")]
    assert "ran out of memory at a peak of" in told and "training.batch_size (now 16" in told
    assert "Traceback" not in logs
    machines.clean()


def test_a_job_that_is_stopped_leaves_a_checkpoint_and_goes_on(
    machines: Machines, words: Callable[..., Sequence[str]]
) -> None:
    from bitray import checkpoint

    found, submission = start(machines, words("stopped"))
    begun(found, 12)
    machines.get(f"/api/jobs/{submission}/stop", data={})
    assert machines.finished(submission) == "STOPPED"
    assert "stopped in stage0; the same command continues it" in machines.logs(submission)
    left = checkpoint.newest_complete(str(found.checkpoints("stage0")))
    assert left is not None
    at = checkpoint.load_state(left)["position"]["step"]
    assert at == found.lines("stage0")[-1]["step"]
    machines.clean()
    again = machines.submit("jobs/pretrain.py", list(words("stopped")))
    assert again == "stopped-2"
    assert f"continues from {left}, step {at}/40, 2 workers" in machines.succeeded(again)

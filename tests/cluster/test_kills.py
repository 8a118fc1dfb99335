"""A run on three nodes, submitted with a token, of which something is killed at a random step: it
ends as the one that nobody disturbed, bit by bit, and leaves nothing behind."""

import random
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from conftest import HEAD, WORKER
from machines import OF_RUNS, ROOT, Machines, alive, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
SEED = 6
STEPS = 40


@pytest.fixture(scope="module")
def clean(machines: Machines, words: Callable[..., Sequence[str]]):  # type: ignore[no-untyped-def]
    """The run that nobody disturbs."""
    from road import Road

    from bitray import Config

    said = list(words("clean"))
    submission = machines.submit("jobs/pretrain.py", said)
    wait_for(lambda: len(machines.processes("RayTrainWorker")) == 2, why="two workers")
    on = [len(machines.processes("RayTrainWorker", node)) for node in (1, 2)]
    wait_for(lambda: machines.processes("_Bundles") or machines.processes("Read"), why="readers")
    readers = [machines.processes("_Bundles", n) + machines.processes("Read", n) for n in (1, 2)]
    machines.succeeded(submission)
    assert submission == "clean-1" and on == [1, 1], "workers are on nodes of their own"
    assert not any(readers), "readers are where data_labels say"
    job = machines.get(f"/api/jobs/{submission}")
    assert job["metadata"]["run"] == "clean"
    return Road(Config.load(overrides=said))


def test_strangers_are_refused(machines: Machines) -> None:
    assert (machines.refusal(None), machines.refusal("0" * 64)) == (401, 403)


@pytest.mark.parametrize("victim", ["worker", "reader", "mixture", "controller", "driver", "node"])
def test_a_kill_costs_only_time(
    machines: Machines,
    words: Callable[..., Sequence[str]],
    clean,  # type: ignore[no-untyped-def]
    victim: str,
) -> None:
    from road import Road

    from bitray import Config

    draw = random.Random(f"{SEED} {victim}")
    step, number = draw.randrange(7, STEPS - 8), draw.randrange(2)
    said = list(words(f"killed_{victim}"))
    found = Road(Config.load(overrides=said))
    submission = machines.submit("jobs/pretrain.py", said)

    def readers() -> list[str]:
        return [name for name in ("_Bundles", "Read") if machines.processes(name)]

    if victim == "reader":  # rows are read ahead, so that they are done long before training is
        wait_for(readers, why="readers")
    else:
        wait_for(lambda: found.reached() >= step, why=f"step {step}")
    struck, at = time.time(), found.reached()
    if victim == "reader":
        machines.strike(readers()[0], number)
    elif victim == "node":
        mine = 1 if machines.processes("RayTrainWorker", 1) and number else 2
        machines.kill(mine)
        machines.raylets[mine] = machines.raylets[machines.add(**WORKER)]
    elif victim == "driver":
        machines.strike(f"jobs/pretrain.py {said[0]}", -1)  # the first is its shell
        assert machines.finished(submission) == "FAILED"
        said_so = "error: this process was killed"  # by another, maybe a little later
        wait_for(lambda: said_so in machines.logs(submission), 30, "its last words")
        machines.clean()
        print(f"\nall that the driver had was gone after {time.time() - struck:.1f} s")
        struck = time.time()
        submission = machines.submit("jobs/pretrain.py", said)
        assert submission == "killed_driver-2"
    else:
        names = {"worker": "RayTrainWorker", "mixture": "MixtureActor",
                 "controller": "TrainController"}  # fmt: skip
        machines.strike(names[victim], number)
    wait_for(lambda: found.reached() > at, why="a new step")
    print(f"\n{victim} killed at step {at}: first new step after {time.time() - struck:.1f} s")
    machines.succeeded(submission)
    assert_undisturbed(found, clean, machines)


def test_a_killed_head_ends_the_run_and_another_cluster_continues_it(
    machines: Machines,
    words: Callable[..., Sequence[str]],
    clean,  # type: ignore[no-untyped-def]
) -> None:
    """Nobody can start workers or take their reports any more: all of them end by themselves."""
    from road import Road

    from bitray import Config

    said = list(words("killed_head"))
    found = Road(Config.load(overrides=said))
    first = Machines(HEAD, WORKER, WORKER, RAY_gcs_rpc_server_reconnect_timeout_s="10")
    try:
        first.submit("jobs/pretrain.py", said)
        wait_for(lambda: found.reached() >= 10, why="step 10")
        running = [process for name in OF_RUNS for process in first.processes(name)]
        first.kill(0)
        struck = time.time()
        wait_for(lambda: not any(map(alive, running)), 120, "all processes of the run have ended")
        print(f"\nhead killed: the run had ended after {time.time() - struck:.1f} s")
    finally:
        first.close()
    submission = machines.submit("jobs/pretrain.py", said)
    assert "continues from" in machines.succeeded(submission)
    assert_undisturbed(found, clean, machines)


def assert_undisturbed(found: Any, clean: Any, machines: Machines) -> None:
    """A run ended as the one that nobody disturbed, and has left nothing behind."""
    from road import differing, weights

    assert found.metrics("stage0") == clean.metrics("stage0")
    for name in ("train/tokens", "influence/weight_code"):
        assert found.metrics("stage0", name) == clean.metrics("stage0", name)
    steps = [line["step"] for line in found.lines("stage0") if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
    decisions = [
        [
            (e["step"], e["first_row"], e["weights"])
            for e in r.json("mixture/stage0.json")["journal"]
        ]
        for r in (found, clean)
    ]
    assert decisions[0] == decisions[1]
    assert not differing(weights(found.final("stage0")), weights(clean.final("stage0")))
    audit = subprocess.run(
        [sys.executable, "scripts/audit_run.py", str(found.folder)],
        cwd=ROOT, env=machines.environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert audit.returncode == 0, audit.stdout + audit.stderr
    machines.clean()

"""Nodes that are announced to go, that go, and that come: the world follows, the numbers stay."""

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import WORKER
from machines import Machines, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1500)]
STEPS = 120
FIXED = ("training.influence.enabled=false", f"training.max_steps={STEPS}")


def drain(machines: Machines, node: int, seconds: int) -> None:
    """What a cloud's notice becomes in Ray."""
    subprocess.run(
        [
            str(Path(sys.executable).parent / "ray"), "drain-node",
            "--address", machines.address, "--node-id", machines.id_of(node),
            "--reason", "DRAIN_NODE_REASON_PREEMPTION", "--reason-message", "spot",
            "--deadline-remaining-seconds", str(seconds),
        ],
        env=machines.environment, check=True, capture_output=True,
    )  # fmt: skip


def test_the_world_follows_the_nodes(
    machines: Machines, words: Callable[..., Sequence[str]]
) -> None:
    from road import Road

    from bitray import Config, checkpoint

    reference = list(words("reference", *FIXED))
    machines.succeeded(machines.submit("jobs/pretrain.py", reference))
    said = list(words("elastic", *FIXED, "scaling.num_workers=[1, 2]"))
    found, clean = (Road(Config.load(overrides=w)) for w in (said, reference))
    submission = machines.submit("jobs/pretrain.py", said)

    def goes_on(what: Callable[[], None], workers: int) -> tuple[float, int, int]:
        """Seconds until the next new step, the step before, and the step that it went on from."""
        began, at, lines = (
            time.time(),
            found.reached(),
            machines.logs(submission).count("stage0    cont"),
        )
        what()
        wait_for(lambda: machines.logs(submission).count("stage0    cont") > lines, why="a start")
        told = [t for t in machines.logs(submission).splitlines() if "continues" in t][-1]
        assert told.endswith(f", {workers} workers"), told
        wait_for(lambda: found.reached() > at + 1, why="a new step")
        return time.time() - began, at, int(told.split("step ")[1].split("/")[0])

    wait_for(lambda: found.reached() >= 12, why="step 12")
    seconds, at, start = goes_on(lambda: drain(machines, 2, 60), 1)
    print(f"\nnotice at step {at}: went on from {start} on 1 worker after {seconds:.1f} s")
    kept = Path(found.checkpoints("stage0")) / f"step_{start:06d}" / "COMPLETE"
    assert start >= at and checkpoint.is_complete(str(kept.parent)), "a checkpoint of its own"
    machines.kill(2)
    first = machines.add(**WORKER)
    seconds, at, start = goes_on(lambda: None, 2)
    print(f"a node came at step {at}: went on from {start} on 2 workers after {seconds:.1f} s")
    assert start % 5 == 0 and start >= at - 5, "at a checkpoint"
    seconds, at, start = goes_on(lambda: machines.kill(first), 1)
    print(f"a node was lost at step {at}: went on from {start} on 1 worker after {seconds:.1f} s")
    machines.succeeded(submission)
    steps = [line["step"] for line in found.lines("stage0") if "train/loss" in line]
    assert steps == list(range(1, STEPS + 1))
    assert found.metrics("stage0", "train/tokens") == clean.metrics("stage0", "train/tokens")
    for name in ("code", "prose", "arithmetic"):
        shares = [r.metrics("stage0", f"mixture/share_{name}") for r in (found, clean)]
        assert shares[0] == shares[1], "the same rows"
    mine, theirs = (np.array(r.metrics("stage0")) for r in (found, clean))
    np.testing.assert_allclose(mine[: at + 20], theirs[: at + 20], rtol=1e-5)
    np.testing.assert_allclose(mine, theirs, rtol=1e-2)
    machines.clean()

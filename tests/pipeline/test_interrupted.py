"""Ctrl-C in the middle of a run, as a user does it at a terminal."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from road import TRAINED, Road, alone, differing, drive, wait_for, weights

from bitray import Config, checkpoint

pytestmark = pytest.mark.ray


def test_an_interrupted_run_is_continued_by_the_same_command(
    words: Callable[..., list[str]], configured: Callable[..., Config], tmp_path: Path
) -> None:
    """Ctrl-C in mid-stage leaves a checkpoint and exit code 130; the same command ends bit-equal to
    one worker that was never interrupted."""
    said = ("interrupted", "scaling.num_workers=1")
    stopped = Road(configured(*said))
    log = tmp_path / "log.txt"
    driver = drive(words(*said), log)
    try:
        wait_for(stopped.checkpoints("stage0") / "step_000008" / "COMPLETE")
        os.killpg(driver.pid, signal.SIGINT)
        assert driver.wait(120) == 130, log.read_text()[-3000:]
        text = log.read_text()
        assert "stopped in stage0; the same command continues it" in text
        assert "Traceback" not in text
        left = checkpoint.newest_complete(str(stopped.checkpoints("stage0")))
        assert left is not None
        at = checkpoint.load_state(left)["position"]["step"]
        assert 8 <= at < 20 and at == stopped.lines("stage0")[-1]["step"]
        assert not (stopped.folder / "STOP").exists()

        driver = drive(words(*said), log)
        assert driver.wait(300) == 0, log.read_text()[-3000:]
    finally:
        if driver.poll() is None:
            os.killpg(driver.pid, signal.SIGKILL)
    assert f"stage0    continues from {left}, step {at}/20" in log.read_text()
    for stage in TRAINED:
        steps = [line["step"] for line in stopped.lines(stage) if "train/loss" in line]
        assert steps == list(range(1, len(steps) + 1))
        losses, expected = alone(stopped, stage)
        assert stopped.metrics(stage) == losses
        assert not differing(weights(stopped.final(stage)), expected)

"""Checkpoints of a stage on one worker, without Ray: what goes on while storage does not, and how a
spike of the loss is gone back before."""

import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from flaky_s3 import FlakyS3
from test_loop import CPU, SPIKY, loop, settings, spoilt

from bitray import checkpoint, lease
from bitray.events import read_events
from bitray.pipeline.folders import StageFolder
from bitray.pipeline.saving import Checkpoints, Rewind
from bitray.pipeline.worker import Stage
from bitray.retries import failing
from bitray.training import state
from bitray.training.goodput import Clock
from bitray.training.loop import Every, Loop
from bitray.training.settings import Resume


@pytest.fixture
def saved(run_dir: str) -> Iterator[Checkpoints]:
    with lease.held(run_dir) as claim:
        made = Checkpoints(StageFolder(run_dir, "here"), claim, 2, print)
        yield made
        made.close()


@pytest.fixture
def run_dir(tmp_path: Path) -> str:
    return str(tmp_path)


def save(checkpoints: Checkpoints, run: Loop, directory: str) -> None:
    checkpoints.save(run, directory, state.as_json(run.position, {"step": run.data_step}), {})


def test_after_a_spike_the_steps_since_the_last_checkpoint_are_left_out(
    saved: Checkpoints, run_dir: str
) -> None:
    folder = saved.folder

    def begun() -> Loop:
        run = loop(settings(**SPIKY), on_spike=partial(saved.spiked, rewind=True))
        if found := checkpoint.newest_complete(folder.root):
            run.position, held = state.resume(found, run.model, run.optimizer, Resume())
            assert held is not None
            run.data_step = held["step"]
        run.left_out = folder.left_out()
        run.hooks = [Every(4, lambda each: save(saved, each, folder.step(each.position.step)))]
        return run

    bad = range(18, 21)
    with pytest.raises(Rewind, match="here, step 18: the loss of tickets 36 to 37 is"):
        begun().run(spoilt(bad))
    assert folder.left_out() == [range(16, 19)]
    with pytest.raises(Rewind, match="step 19"):
        begun().run(spoilt(bad, 32))
    with pytest.raises(Rewind, match="step 20"):
        begun().run(spoilt(bad, 32))
    last = begun()
    last.run(spoilt(bad, 2 * last.data_step))
    saved.wait()
    assert (last.position.step, last.position.skipped) == (24, 5)
    events = [event for event in read_events(run_dir) if event["kind"] == "loss_spike"]
    assert [event["step"] for event in events] == [18, 19, 20]
    assert events[0]["tickets"] == [36, 37] and events[0]["left_out"] == [16, 17, 18]
    assert events[0]["loss"] > 1.5 * events[0]["mean"]


class TestWithoutStorage:
    @pytest.fixture
    def run_dir(self, s3: str) -> str:
        return f"{s3}/run"

    def test_a_new_best_waits_for_storage_and_training_does_not(
        self, saved: Checkpoints, proxy: FlakyS3
    ) -> None:
        """Evaluations with a checkpoint on its way that cannot get there: nobody waits for it, and
        the next one that is better than what is kept is."""
        run = loop(settings())
        stage: Any = SimpleNamespace(
            device=CPU,
            folder=saved.folder,
            checkpoints=saved,
            save=partial(save, saved),
            clock=Clock(),
        )
        stage.note = partial(Stage.note, stage)
        stage.note(run, {"a": 3.0})
        saved.wait()
        proxy.rate = 1.0
        save(saved, run, saved.folder.step(4))
        while failing() is None:
            time.sleep(0.01)
        began = time.monotonic()
        stage.note(run, {"a": 2.0})
        assert time.monotonic() - began < 60
        assert run.position.best == 3.0
        proxy.rate = 0.0
        saved.wait()
        stage.note(run, {"a": 2.5})
        saved.wait()
        assert run.position.best == 2.5
        assert checkpoint.load_state(saved.folder.best)["position"]["best"] == 2.5

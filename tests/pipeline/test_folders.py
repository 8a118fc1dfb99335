"""Which checkpoint a stage continues from, and what it takes over of it."""

from pathlib import Path

import pytest

from bitray import Config, checkpoint
from bitray.pipeline.folders import StageFolder, passed_over, resume_point
from bitray.pipeline.plan import plan
from bitray.pipeline.streams import data_state


def config(folder: Path, *words: str) -> Config:
    return Config.load(overrides=[f"output_dir={folder}", "experiment=mine", *words])


def save(directory: str, step: int, epoch: int) -> None:
    held = {"stage": "stage2", "data": {"step": step}, "epoch": epoch}
    checkpoint.save(directory, {}, held, {})


@pytest.mark.parametrize("flag", ["load_data_state", "load_training_state"])
def test_flags_of_a_resume_are_not_for_workers_that_start_again(tmp_path: Path, flag: str) -> None:
    """A worker is killed in the attempt of epoch 2: its own checkpoint is continued whole. The next
    attempt is told again what not to take over."""
    told = config(tmp_path, f"training.resume.{flag}=false")
    folder = StageFolder(told.run_dir, "stage2")
    save(folder.step(4), 4, epoch=1)
    assert data_state(told, "stage2", 2) is None
    assert data_state(config(tmp_path), "stage2", 2) == {"step": 4}
    save(folder.step(6), 2, epoch=2)
    assert data_state(told, "stage2", 2) == {"step": 2}
    assert data_state(told, "stage2", 3) is None


def test_flags_of_a_resume_are_for_another_runs_checkpoint_of_the_same_epoch(
    tmp_path: Path,
) -> None:
    named = str(tmp_path / "other" / "step_000004")
    save(named, 4, epoch=1)
    words = [f"training.resume.checkpoint_path={named}"]
    assert data_state(config(tmp_path, *words), "stage2", 1) == {"step": 4}
    words += ["training.resume.load_data_state=false"]
    assert data_state(config(tmp_path, *words), "stage2", 1) is None


def test_a_stage_goes_on_from_its_own_checkpoint_and_says_which_one_it_does_not(
    tmp_path: Path,
) -> None:
    named = str(tmp_path / "other" / "step_000004")
    save(named, 4, epoch=1)
    told = config(tmp_path, f"stages.stage2.resume.checkpoint_path={named}")
    assert resume_point(told, "stage2") == named
    assert passed_over(told, "stage2", named) is None
    assert "step_000004" in plan(told) and "which was named" not in plan(told)
    own = StageFolder(told.run_dir, "stage2").step(6)
    save(own, 6, epoch=1)
    assert resume_point(told, "stage2") == own
    assert f"goes on from them, not from {named}" in (passed_over(told, "stage2", own) or "")
    assert "step_000006" in plan(told) and "stage2 has checkpoints of its own" in plan(told)
    assert passed_over(config(tmp_path), "stage2", own) is None

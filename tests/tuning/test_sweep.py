"""What a trial tells Tune of a run's records, by hand."""

import json
from pathlib import Path

import pytest

from bitray import Config, storage
from bitray.pipeline.report import read_metrics
from bitray.tuning.space import METRICS
from bitray.tuning.trial import lengths, outcome, share, trial_config

WORDS = [
    "stages.stage1_9.max_steps=10", "stages.stage1_9.lambda_warmup.warmup_steps=5",
    "stages.stage2.max_steps=20",
]  # fmt: skip
LINES = [
    {"stage": "stage1_9", "step": 10, "eval/a_loss": 4.0, "train/peak_memory_gb": 3.0},
    {"stage": "stage2", "step": 4, "train/tokens_per_second": 100.0},
    {"stage": "stage2", "step": 8, "train/tokens_per_second": 300.0},
    {"stage": "stage2", "step": 10, "eval/a_loss": 2.0, "eval/b_loss": 3.0},
]  # fmt: skip


def config_at(folder: Path) -> Config:
    return Config.load(overrides=[*WORDS, f"output_dir={folder}", "experiment=t"])


def test_metrics_of_a_trial_on_its_way(tmp_path: Path) -> None:
    config = config_at(tmp_path)
    storage.write_json(f"{config.run_dir}/evaluations.json", {"stage1": {"a": 6.0, "b": 5.0}})
    row = 256 * 8  # length and global batch of the demo's stages
    assert lengths(config) == {"stage1_9": 10 * row, "stage2": 20 * row}
    told = outcome(config, LINES)
    tokens = 10 * row + 10 * row
    assert told["loss"] == 2.5 and told["loss_drop"] == 3.0
    assert (told["tokens"], told["steps"]) == (tokens, 20)
    assert told["seconds"] == pytest.approx(tokens / 200) and told["peak_memory_gb"] == 3.0
    assert told["tokens_per_second_per_gb"] == pytest.approx(200 / 3)
    assert told["loss_drop_per_second_per_gb"] == pytest.approx(3 / (tokens / 200) / 3)
    assert told["progress"] == pytest.approx(2 / 3)
    assert outcome(config, LINES[:1] + LINES[:1])["progress"] == pytest.approx(1 / 3)
    assert set(told) == {*METRICS, "progress"}


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    storage.write_text(f"{tmp_path}/metrics.jsonl", text + '{"stage": "sta')
    assert read_metrics(str(tmp_path)) == LINES and read_metrics(str(tmp_path / "nothing")) == []


def test_what_trials_have_in_common_is_linked_once(tmp_path: Path) -> None:
    base = tmp_path / "sweep" / "common"
    for stage in ("stage0", "stage1", "stage1_9"):
        storage.write_text(str(base / f"{stage}_checkpoint" / "x"), stage)
    storage.write_json(str(base / "evaluations.json"), {"stage1": {"a": 6.0}, "stage2": {"a": 1.0}})
    storage.write_json(str(base / "mixture" / "stage0.json"), {"rows": 5})
    sample = {"stages.stage2.optimizer.lr": 1e-3}
    config = trial_config(config_at(tmp_path), str(base), sample)
    assert config.stages["stage2"].optimizer.lr == 1e-3
    assert trial_config(config_at(tmp_path), str(base), sample).run_dir == config.run_dir
    wandb = config.logging.wandb
    assert wandb.group == "sweep" and wandb.tags == ("stage1_9", "stage2")
    for _ in range(2):
        share(config, str(base))
    run = Path(config.run_dir)
    assert run.parent == tmp_path / "sweep" / "trials"
    assert (run / "stage1_checkpoint" / "x").read_text() == "stage1"
    assert not (run / "stage1_9_checkpoint").exists()
    assert json.loads((run / "evaluations.json").read_text()) == {"stage1": {"a": 6.0}}
    assert json.loads((run / "mixture" / "stage0.json").read_text()) == {"rows": 5}

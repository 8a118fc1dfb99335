"""What every job says of itself, how words become a configuration, and what a dry run does."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import ray
import yaml
from command_line import JOBS, Command, tree

from bitray import Config
from bitray.pipeline.folders import lasting
from bitray.settings import UserError

ALL = sorted(path.stem for path in JOBS.glob("*.py"))


# -------------------------------------------------------------------------------------------- help


@pytest.mark.parametrize("job", ALL)
def test_help_tells_how_to_call_it(command: Command, job: str) -> None:
    done = command(job, "--help")
    assert done.code == 0 and done.err == ""
    assert f"python jobs/{job}.py " in done.out and "examples:" in done.out
    assert "--config FILE" in done.out and "path.to.key=value" in done.out


@pytest.mark.parametrize("job", ["pretrain", "prepare"])
def test_help_lists_groups_and_their_choices(command: Command, job: str) -> None:
    out = command(job, "--help").out
    groups = {name: each for name, each in Config.groups().items() if name != "tasks"}
    assert "  tasks=" not in out, "a group of the evaluation"
    for group, choices in groups.items():
        assert f"  {group}=" in out
        for name, about in choices.items():
            assert name in out and about in out, f"{group}={name}"
    for group, name in (default.split("/") for default in Config.default_groups.values()):
        assert f"   *{name}" in out, f"{group}={name} is the default"


def test_help_of_an_evaluation_lists_data(command: Command) -> None:
    out = command("evaluate", "--help").out
    assert "  tasks=" in out and "GLUE" in out
    assert "  data=" in out and "embedded" in out and "local" in out and "  scaling=" not in out


def test_help_of_a_sweep_tells_of_its_report(command: Command) -> None:
    assert "--analyze-only SWEEP" in command("tune", "--help").out
    assert "--analyze-only" not in command("pretrain", "--help").out


def test_what_only_writes_a_report_takes_nothing_else(command: Command, here: Path) -> None:
    said = command("tune", "space.yaml", "--analyze-only", "runs/demo").sentence()
    assert said.startswith("space.yaml: --analyze-only reads the space in the sweep's own folder")
    said = command("tune", "--analyze-only", "runs/demo").sentence()
    assert "there is no sweep" in said and "searcher.json is missing" in said


def test_a_sweep_takes_its_settings_from_its_space(command: Command) -> None:
    said = command("tune", "space.yaml", "--config", "mine.yaml").sentence()
    assert said.startswith("--config mine.yaml: what trials share stands under run")


# ---------------------------------------------------------------------------------------- dry run


def planned(out: str, column: int) -> dict[str, str]:
    """A column of a plan's table by stage."""
    rows = [line.split() for line in out.splitlines() if line.startswith("stage")]
    return {row[0]: row[column] for row in rows[1:]}


def test_a_dry_run_plans_and_leaves_nothing(command: Command, here: Path) -> None:
    done = command("pretrain", "--dry-run", "experiment=mine", "resume.fresh=true")
    assert done.code == 0 and done.err == "", done.err
    for word in ("runs/mine", "stage0", "stage1_9", "stage2", "memory/worker", "parameters",
                 "the beginning", "code 40.0%", "tq2_0", "nothing was trained"):  # fmt: skip
        assert word in done.out
    assert tree(here) == {}


def test_a_dry_run_shows_where_a_run_stands(command: Command, run_dir: str) -> None:
    before = tree(run_dir)
    done = command("pretrain", "--dry-run", "--config", f"{run_dir}/config.yaml")
    assert done.code == 0, done.err
    standing = planned(done.out, -1)
    assert standing["stage1_9"] == "step_000002" and standing["stage2"] == "complete"
    assert tree(run_dir) == before


def test_a_job_in_a_copy_of_its_folder_keeps_its_run_at_home(
    command: Command, here: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray runs what was submitted with a working directory in a folder of this name, another one
    after every edit."""
    copy = here / "session/runtime_resources/working_dir_files/_ray_pkg_0123456789abcdef"
    copy.mkdir(parents=True)
    monkeypatch.chdir(copy)
    monkeypatch.setenv("HOME", str(here / "home"))
    done = command("pretrain", "--dry-run")
    assert f"run       {here}/home/runs/bitray_demo" in done.out
    assert done.out.count(f"note: runs is {here}/home/runs, for this job's own folder") == 1
    for place in ("s3://bucket/runs", str(here / "elsewhere")):
        assert lasting(place) == place
    monkeypatch.chdir(here)
    assert lasting("runs") == str(here / "runs")


@pytest.mark.parametrize("words", [["gpu=a100_80gb"], ["cost.gpu=a100_80gb"]])
def test_a_plan_for_gpus_that_are_elsewhere_tells_what_they_would_cost(
    command: Command, words: list[str]
) -> None:
    """Sixteen of them are not on this machine, which is no reason not to count."""
    done = command("pretrain", "--dry-run", "scaling=fsdp_large", *words)
    assert done.code == 0, done.err
    assert "runpod $" in done.out and "GB of checkpoints" in done.out
    assert "only a plan: scaling: stage stage0 needs 136 CPUs" in done.out
    for more in ([], [*words, "probe=true"]):  # nobody was named, or there has to be one to measure
        told = command("pretrain", "--dry-run", "scaling=fsdp_large", *more).sentence()
        assert "needs 136 CPUs" in told


@pytest.mark.ray
def test_a_submitted_dry_run_asks_the_cluster_that_it_is_on(
    tmp_path: Path, ray_cluster: None
) -> None:
    """In a process of its own, with the address that Ray gives to jobs: 2 CPUs, whatever this
    machine has."""
    context: Any = ray.get_runtime_context()
    words = ["--dry-run", "gpu=a100_80gb", "scaling.num_workers=99"]
    done = subprocess.run(
        [sys.executable, JOBS / "pretrain.py", *words],
        cwd=tmp_path, env=os.environ | {"RAY_ADDRESS": context.gcs_address},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 2, done.stdout
    assert "the cluster has 2;" in done.stderr


# ---------------------------------------------------------------------------------- words and files


def test_a_plan_follows_the_words_and_the_file(command: Command, here: Path) -> None:
    """Stage preset < file < words, and within each `training.*` < `stages.NAME.*`."""
    values = {
        "training": {"max_steps": 6, "lambda_warmup": {"warmup_steps": 3}},
        "stages": {"stage2": {"max_steps": 8}},
    }
    (here / "mine.yaml").write_text(yaml.safe_dump(values))
    done = command("pretrain", "stages.stage0.max_steps=4", "--dry-run", "--config", "mine.yaml")
    assert done.code == 0, done.err
    steps = planned(done.out, 1)
    assert (steps["stage0"], steps["stage1_9"], steps["stage2"]) == ("4", "6", "8")
    done = command("pretrain", "training.max_steps=3", "--config", "mine.yaml", "--dry-run")
    steps = planned(done.out, 1)
    assert set(steps.values()) <= {"3", "0"}, "a later voice wins over an earlier one"


SPELLINGS = {
    "training.max_steps": 7,
    "training.total_tokens": 1_000_000,
    "training.batch_size": 3,
    "training.gradient_accumulation_steps": 5,
    "training.max_seq_length": 64,
    "training.packing.enabled": False,
    "training.optimizer.type": "adamw",
    "training.optimizer.lr": 2e-3,
    "training.lambda_warmup.enabled": True,
    "training.lambda_warmup.warmup_steps": 6,
    "training.lambda_warmup.schedule": "cosine",
    "training.lm_loss_weight": 0.25,
    "training.objectives.continue_pretrain.weight": 0.75,
    "training.torch_compile.enabled": True,
    "training.torch_compile.mode": "max-autotune",
    "training.torch_compile.fullgraph": True,
    "training.resume.checkpoint_path": "somewhere",
    "training.resume.load_optimizer_state": False,
    "training.resume.load_scheduler_state": False,
    "training.resume.load_training_state": False,
    "training.resume.load_data_state": False,
    "training.resume.strict_model_load": False,
    "model.quantization.activation_bits": 8,
    "logging.wandb.enabled": False,
    "output_dir": "elsewhere",
    "experiment": "mine",
}
"""ARCHITECTURE, "Spellings": those of this stage of the house."""


@pytest.mark.parametrize("path", SPELLINGS)
def test_the_usual_spellings_reach_every_stage(path: str) -> None:
    value = SPELLINGS[path]
    words = ["training.lambda_warmup.warmup_steps=5"]  # the demo's is longer than 7 steps
    config = Config.load(overrides=[*words, f"{path}={yaml.safe_dump(value).split(chr(10))[0]}"])
    root, *below = path.split(".")
    homes = list(config.stages.values()) if root == "training" else [getattr(config, root)]
    for home in homes:
        found = home
        for name in below:
            found = getattr(found, name)
        assert found == value


def test_distributed_is_another_name_of_scaling(tmp_path: Path) -> None:
    wanted = Config.load(overrides=["scaling=fsdp_multi", "scaling.readers=3"]).scaling
    assert wanted.num_workers == 4 and wanted.readers == 3
    words = ["distributed=fsdp_multi", "distributed.readers=3"]
    assert Config.load(overrides=words).scaling == wanted
    sample = {"distributed": "fsdp_multi", "distributed.readers": 3}
    assert Config.load().override(sample).scaling == wanted
    groups = {"model": "demo", "data": "embedded", "pipeline": "demo", "distributed": "fsdp_multi"}
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"groups": groups}))
    path = str(tmp_path / "mine.yaml")
    assert Config.load(path, ["scaling.readers=3"]).scaling == wanted


def test_a_checkpoint_is_named_by_the_environment_too(
    command: Command, run_dir: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`RESUME_CHECKPOINT` is looked at before anything starts, like the setting."""
    step = f"{run_dir}/stage1_9_checkpoint/checkpoints/step_000002"
    words = ["pretrain", "--dry-run", "--config", f"{run_dir}/config.yaml"]
    monkeypatch.setenv("RESUME_CHECKPOINT", step)
    assert command(*words).code == 0
    monkeypatch.setenv("RESUME_CHECKPOINT", f"{step}0")
    assert "nearest: 'step_000002'" in command(*words).sentence()


def test_a_float_as_people_write_it() -> None:
    stage = Config.load(overrides=["training.optimizer.lr=1e-4"]).stages["stage2"]
    assert stage.optimizer.lr == 1e-4
    with pytest.raises(UserError, match="valid number"):
        Config.load(overrides=["training.optimizer.lr=1e-4x"])

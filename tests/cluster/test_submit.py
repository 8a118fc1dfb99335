"""What a user types, against a cluster with a token: what is uploaded, what is refused."""

import json
import os
import subprocess
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from machines import ROOT, Machines
from ray.job_submission import JobStatus
from submit import Name, attempt_of, name_of

from bitray.settings import UserError

RAY = Path(sys.executable).parent / "ray"


@pytest.mark.ray
@pytest.mark.slow
def test_ray_job_submit_as_in_the_readme(
    machines: Machines, words: Callable[..., Sequence[str]]
) -> None:
    """`python` is the one on the PATH of the head."""
    said = [*words("by_ray"), "training.max_steps=6", "training.influence.enabled=false"]
    command = [str(RAY), "job", "submit", "--working-dir", ".", "--submission-id", "by_ray-1",
               "--metadata-json", json.dumps({"run": "by_ray"}), "--"]  # fmt: skip
    given = {**machines.environment, "RAY_API_SERVER_ADDRESS": machines.url}
    done = subprocess.run(
        [*command, "python", "jobs/pretrain.py", *said],
        cwd=ROOT, env=given, capture_output=True, text=True, timeout=500, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "mean held-out loss" in done.stdout or "report " in done.stdout
    job = machines.get("/api/jobs/by_ray-1")
    assert job["status"] == "SUCCEEDED" and job["metadata"]["run"] == "by_ray"
    again = subprocess.run(
        [*command, "python", "-V"],
        cwd=ROOT, env=given, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert again.returncode != 0 and "already exists" in again.stdout + again.stderr
    without = {k: v for k, v in given.items() if not k.startswith("RAY_AUTH")}
    stranger = subprocess.run(
        [str(RAY), "job", "list"],
        cwd=ROOT, env=without | {"HOME": str(machines.folder)}, capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip
    assert stranger.returncode != 0 and "Missing authentication token" in stranger.stderr


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("combo", ["ce_only", "dlm", "distill", "bitdistill", "lrc"])
def test_every_smoke_combination_passes(
    machines: Machines, tmp_path: Path, combo: str, workers: int
) -> None:
    said = [f"combo={combo}", f"workers={workers}", f"output_dir={tmp_path}"]
    submission = machines.submit("jobs/smoke.py", [*said, "data.sources.code.max_bytes=200000"])
    assert submission == f"smoke_{combo}_{workers}-1"
    assert "smoke     passed: " in machines.succeeded(submission)


@pytest.fixture
def mine(tmp_path: Path) -> str:
    """A file of settings."""
    (tmp_path / "mine.yaml").write_text("experiment: mine\n")
    return str(tmp_path / "mine.yaml")


def test_a_job_is_named_by_the_folder_that_it_writes(mine: str) -> None:
    """Words mean what they mean to the job itself."""
    space = str(ROOT / "search_spaces/demo.yaml")
    for job, words, name in [
        ("pretrain", [], "bitray_demo"),
        ("pretrain", ["--config", mine], "mine"),
        ("pretrain", ["scaling=laptop", f"--config={mine}"], "mine"),
        ("smoke", ["combo=dlm", "workers=2"], "smoke_dlm_2"),
        ("tune", [space, "num_trials=30"], "demo"),
        ("tune", [space, "experiment=other"], "other"),
    ]:
        assert name_of(f"jobs/{job}.py", words) == Name(name, alone=True)
    with pytest.raises(SystemExit):
        name_of("jobs/pretrain.py", ["--confg", mine])


class Client:
    """A cluster on which these jobs go on."""

    def __init__(self, *running: str) -> None:
        self.jobs = [SimpleNamespace(submission_id=j, status=JobStatus.RUNNING) for j in running]

    def list_jobs(self) -> list[Any]:
        return self.jobs


def test_only_what_writes_a_run_is_alone(mine: str) -> None:
    client: Any = Client("mine-1", "evaluate-4", "dry_run_mine-1", "prepare_mine-1")
    space = str(ROOT / "search_spaces/demo.yaml")
    with pytest.raises(UserError, match="mine is being driven by job mine-1"):
        attempt_of(client, name_of("jobs/pretrain.py", ["--config", mine]))
    assert attempt_of(client, name_of("jobs/tune.py", [space])) == 1
    for job, words, attempt in [
        ("evaluate", ["checkpoint=a"], 5),
        ("pretrain", ["--config", mine, "--dry-run"], 2),
        ("prepare", ["--config", mine, "--preview", "2"], 2),
        ("tune", ["--analyze-only", "runs/mine"], 1),
    ]:
        assert attempt_of(client, name_of(f"jobs/{job}.py", words)) == attempt


def test_only_code_is_uploaded(tmp_path: Path) -> None:
    """The package that Ray would upload, of a copy of the repository with what a user has in it."""
    from ray._private.runtime_env.packaging import create_package

    tracked = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    names = [n for n in tracked.stdout.split() if n.startswith(("bitray/", "jobs/", ".", "tests/"))]
    here = tmp_path / "repository"
    for name in [*names, ".rayignore", ".gitignore"]:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_bytes((ROOT / name).read_bytes())
    heavy = [".venv/lib/x.py", "runs/a/metrics.jsonl", "wandb/run/x", "model.gguf", ".git/config",
             "data/books.jsonl.gz", "shard.parquet", "a/model.safetensors"]  # fmt: skip
    for name in heavy:
        (here / name).parent.mkdir(parents=True, exist_ok=True)
        (here / name).write_text("x")
    os.chdir(here)
    create_package(str(here), tmp_path / "package.zip", include_gitignore=True, excludes=[])
    with zipfile.ZipFile(tmp_path / "package.zip") as package:
        held = {name for name in package.namelist() if not name.endswith("/")}
    assert "jobs/pretrain.py" in held and "bitray/configs/model/demo.yaml" in held
    assert not held & set(heavy) and not any(name.startswith("tests/") for name in held)
    assert sum(info.file_size for info in package.infolist()) < 5e6

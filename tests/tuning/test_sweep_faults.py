"""Sweeps of real trials in which things are killed, diverge, and lose their node."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bitray import storage
from bitray.pipeline.report import read_metrics
from bitray.tuning.experiment import from_json
from bitray.tuning.trial import trial_name

ROOT = Path(__file__).parents[2]
SPACE = str(ROOT / "search_spaces" / "demo.yaml")
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(3600)]
PATIENCE = 900.0
"""Seconds until something has to happen, on a machine with much else to do."""


@pytest.fixture
def environment() -> Iterator[dict[str, str]]:
    """A Ray of its own for the processes of a test, in a short folder, for the sockets in it."""
    folder = tempfile.mkdtemp(prefix="bt", dir="/tmp")
    yield {**os.environ, "RAY_TMPDIR": folder, "RAY_AUTH_MODE": "token"}
    for each in psutil.Process().children():
        if any(job in " ".join(each.cmdline()) for job in ("tune.py", "three_nodes.py")):
            each.kill()  # of a test that failed; what it started goes with it
    shutil.rmtree(folder, ignore_errors=True)


def begun(folder: Path, environment: dict[str, str], *words: str) -> psutil.Popen:
    """A driver of the demo's sweep."""
    command = [sys.executable, str(ROOT / "jobs" / "tune.py"), SPACE, f"output_dir={folder}"]
    with open(folder / "driver.log", "a") as log:
        return psutil.Popen([*command, *words], cwd=folder, env=environment, stdout=log, stderr=log)


def wait_for(condition: Callable[[], Any], driver: psutil.Popen, folder: Path) -> Any:
    end = time.monotonic() + PATIENCE
    while not (found := condition()):
        assert driver.poll() is None, (folder / "driver.log").read_text()[-3000:]
        assert time.monotonic() < end, (folder / "driver.log").read_text()[-3000:]
        time.sleep(0.5)
    return found


def processes(driver: psutil.Popen, title: str) -> list[psutil.Process]:
    """Of Ray, below a driver."""
    found = []
    for each in driver.children(recursive=True):
        try:
            if title in " ".join(each.cmdline()):
                found.append(each)
        except psutil.NoSuchProcess:
            continue
    return found


def writers(driver: psutil.Popen) -> list[psutil.Process]:
    """Workers that train: those that hold metrics open."""
    found = []
    for each in driver.children(recursive=True):
        try:
            if any(Path(file.path).name == "metrics.jsonl" for file in each.open_files()):
                found.append(each)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def ended(folder: Path) -> dict[int, list[Any]]:
    file = folder / "demo" / "searcher.json"
    return dict(json.loads(file.read_text())["ended"]) if file.exists() else {}


def advanced(folder: Path) -> list[Path]:
    """Trials in the middle of Stage 2, with a checkpoint."""
    found = folder.glob("demo/trials/*/stage2_checkpoint/checkpoints/step_*/COMPLETE")
    return sorted({path.parents[3] for path in found})


def test_a_sweep_that_is_hit_by_everything(tmp_path: Path, environment: dict[str, str]) -> None:
    """A worker, a trial and the driver are killed, somebody types Ctrl-C, one trial diverges, some
    are stopped early: no trial that ended runs again, and the best configuration reproduces its
    score."""
    driver = begun(tmp_path, environment)
    wait_for(lambda: advanced(tmp_path), driver, tmp_path)
    [worker, *_] = wait_for(lambda: writers(driver), driver, tmp_path)
    worker.kill()
    wait_for(lambda: ended(tmp_path), driver, tmp_path)
    wait_for(lambda: advanced(tmp_path), driver, tmp_path)
    [trial, *_] = wait_for(lambda: processes(driver, "ImplicitFunc"), driver, tmp_path)
    trial.kill()
    wait_for(lambda: len(ended(tmp_path)) >= 4, driver, tmp_path)
    family = driver.children(recursive=True)
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    _, alive = psutil.wait_procs(family, timeout=300)
    assert not alive

    before = ended(tmp_path)
    overrides = dict(json.loads((tmp_path / "demo" / "searcher.json").read_text())["overrides"])
    runs = {n: tmp_path / "demo" / "trials" / trial_name(overrides[n]) for n in before}
    records = {n: (run / "metrics.jsonl").read_bytes() for n, run in runs.items()}
    driver = begun(tmp_path, environment)
    wait_for(lambda: writers(driver), driver, tmp_path)
    family = driver.children(recursive=True)
    driver.send_signal(signal.SIGINT)
    assert driver.wait(60) == 130, (tmp_path / "driver.log").read_text()[-3000:]
    _, alive = psutil.wait_procs(family, timeout=60)
    assert not alive and len(ended(tmp_path)) < 8
    driver = begun(tmp_path, environment)
    assert driver.wait(PATIENCE) == 0, (tmp_path / "driver.log").read_text()[-3000:]

    after = ended(tmp_path)
    assert len(after) == 8 and {n: after[n] for n in before} == before
    assert {n: (run / "metrics.jsonl").read_bytes() for n, run in runs.items()} == records
    assert len(list(tmp_path.glob("demo/trials/*"))) == 8  # none has begun under another name
    statuses = [status for status, _ in after.values()]
    assert (
        set(statuses) == {"completed", "early_stopped", "abandoned"} and after[0][0] == "abandoned"
    )
    state = json.loads((tmp_path / "demo" / "searcher.json").read_text())
    table = from_json(state["ax"]).summarize()
    known = dict(zip(table["trial_index"], table["trial_status"].str.lower(), strict=True))
    assert known == {n: status for n, (status, _) in after.items()}
    assert not list(tmp_path.glob("demo/trials/*/stage*_checkpoint"))
    losses = {n: found["loss"] for n, (status, found) in after.items() if status == "completed"}
    assert score_of_best(tmp_path, environment) == pytest.approx(min(losses.values()), abs=1e-6)


def score_of_best(folder: Path, environment: dict[str, str]) -> float:
    """Held-out loss of the configuration that a sweep found, run by itself."""
    best = str(folder / "demo" / "best.yaml")
    command = [sys.executable, str(ROOT / "jobs" / "pretrain.py"), "--config", best]
    done = subprocess.run(
        [*command, f"output_dir={folder}", "experiment=again"],
        cwd=folder, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    last = [each for each in read_metrics(str(folder / "again")) if "eval/code_loss" in each][-1]
    losses = [value for name, value in last.items() if name.startswith("eval/")]
    return sum(losses) / len(losses)


def test_a_sweep_in_object_storage(tmp_path: Path, s3: str, environment: dict[str, str]) -> None:
    """Stages in common are found there by all trials; nothing is kept on local disks."""
    words = [
        "stages.stage0.max_steps=20",
        "num_trials=4",
        "sobol_trials=4",
        "stages.stage2.max_steps=5",
    ]
    driver = begun(tmp_path, environment, *words, f"output_dir={s3}/sweeps", "experiment=remote")
    assert driver.wait(PATIENCE) == 0, (tmp_path / "driver.log").read_text()[-3000:]
    folder = f"{s3}/sweeps/remote"
    state = storage.read_json(f"{folder}/searcher.json")
    statuses = [status for _, (status, _) in state["ended"]]
    assert len(statuses) == 4 and "failed" not in statuses and "completed" in statuses
    assert storage.exists(f"{folder}/best.yaml")
    assert len(storage.list_dirs(f"{folder}/trials")) == 4
    trials = {info.uri for info in storage.list_files(f"{folder}/trials")}
    assert not [uri for uri in trials if "_checkpoint/" in uri]
    assert [path.name for path in tmp_path.iterdir()] == ["driver.log"]


def test_three_nodes_of_which_one_goes(tmp_path: Path, environment: dict[str, str]) -> None:
    """Trials spread; a lost node costs its trial what it did after its last checkpoint and others
    nothing; resources of what was stopped are back within 20 s; nothing is left at the end."""
    script = Path(__file__).with_name("three_nodes.py")
    words = ["scaling.cpus_per_worker=0.6", "max_concurrent=3", "stages.stage0.max_steps=40"]
    done = subprocess.run(
        [sys.executable, script, SPACE, str(tmp_path), *words],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    [line] = [line for line in done.stdout.splitlines() if line.startswith("FOUND ")]
    found = json.loads(line.removeprefix("FOUND "))
    print(json.dumps(found, indent=1))
    assert (found["nodes"], found["beside"]) == (3, 3)
    again = [name for name, opened in found["generations"].items() if max(opened) > 1]
    assert set(again) - set(found["rewound"]) == {found["lost"]}
    for name, (lines, same) in found["kept"].items():
        assert same == lines or (name == found["lost"] and same > 0)
    assert found["freed"] and not found["not_freed"] and max(found["freed"]) <= 20
    assert found["released"] < 60 and found["gone"] < 60, found["alive"]

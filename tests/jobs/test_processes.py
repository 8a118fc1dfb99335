"""What only a process of its own can show: exit codes, the streams, and how fast it answers."""

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
from command_line import JOBS, tree

LIGHT = 2000
"""Modules that are loaded; about 1,850, of which torch is most. pandas alone would add 350."""


def call(
    folder: Path, job: str, *words: str, **environment: str
) -> subprocess.CompletedProcess[str]:
    """A job as a shell would start it, in an empty folder, without an account or a network."""
    away = ("RAY_ADDRESS", "RESUME_CHECKPOINT", "WANDB_API_KEY")
    inherited = {name: value for name, value in os.environ.items() if name not in away}
    return subprocess.run(
        [sys.executable, JOBS / f"{job}.py", *words],
        cwd=folder, capture_output=True, text=True, check=False, timeout=300,
        env={**inherited, **environment},
    )  # fmt: skip


@pytest.mark.parametrize(
    ("job", "words", "code"),
    [
        ("pretrain", ["--help"], 0),
        ("pretrain", ["training.optimizer.lrr=1"], 2),
        ("prepare", ["data=locall"], 2),
        ("generate", ["checkpoint=x", "prompt=y", "sampling.top_q=1"], 2),
        ("serve", ["model=x", "prt=1"], 2),
    ],
)
def test_help_and_a_typo_are_answered_at_once(
    tmp_path: Path, job: str, words: list[str], code: int
) -> None:
    """Without the libraries that take seconds to load. Their number is bounded, not the time, which
    for one command varies by half on a machine that others use."""
    done = call(tmp_path, job, *words, PYTHONPROFILEIMPORTTIME="1")
    lines = done.stderr.splitlines()
    imported = {line.rpartition("|")[2].strip() for line in lines if line.startswith("import time")}
    assert done.returncode == code
    assert imported & {"bitray.settings"} and not imported & {
        "ray",
        "transformers",
        "torch._inductor",
    }
    told = [line for line in lines if not line.startswith("import time")]
    assert len(told) == (code == 2) and all(line.startswith("error: ") for line in told)
    assert len(imported) < LIGHT


def test_a_hub_that_cannot_be_reached_is_one_sentence(tmp_path: Path) -> None:
    """Also where libraries write to the terminal themselves. Nobody answers at that address."""
    done = call(
        tmp_path, "pretrain", "model=smollm2_135m", "pipeline=standard", "--dry-run",
        HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=str(tmp_path / "cache"), HF_HUB_OFFLINE="1",
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: HuggingFaceTB/SmolLM2-135M: no such folder, and not loaded from")
    assert not (tmp_path / "runs").exists()


def test_too_long_a_path_for_the_sockets_of_ray_is_one_sentence(tmp_path: Path) -> None:
    folder = tmp_path / ("a" * 90)
    done = call(tmp_path, "pretrain", "experiment=x", RAY_TMPDIR=str(folder))
    assert done.returncode == 2, done.stderr
    told = f"RAY_TMPDIR={folder}: too long a path for Ray's sockets; set RAY_TMPDIR=/tmp"
    assert done.stderr.splitlines()[-1] == f"error: {told}"
    assert "Traceback" not in done.stderr


def test_an_export_speaks_of_nothing_else(tmp_path: Path, models: Path) -> None:
    """No progress bars and warnings of libraries in a log, and only the file is written."""
    done = call(
        tmp_path, "export", f"checkpoint={models / 'ternary'}", "format=gguf", "output=m.gguf"
    )
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("m.gguf: i2_s as llama")
    assert sorted(tree(tmp_path)) == ["m.gguf"]


def test_a_server_answers_until_it_is_told_to_end(tmp_path: Path, models: Path) -> None:
    """Its first line says where it is; Ctrl-C ends it without a word."""
    words = [f"model={models / 'dense'}", "port=0"]
    with subprocess.Popen(
        [sys.executable, JOBS / "serve.py", *words],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    ) as server:  # fmt: skip
        try:
            assert server.stdout is not None and server.stderr is not None
            line = server.stdout.readline()
            assert line.startswith(f"serving {models / 'dense'} at http://127.0.0.1:"), line
            url, body = line.split()[3], {"prompt": "The", "max_tokens": 3}
            request = urllib.request.Request(
                f"{url}/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(request, timeout=60) as answer:
                assert json.loads(answer.read())["usage"]["completion_tokens"] <= 3
            server.send_signal(signal.SIGINT)
            assert server.wait(30) == 0 and server.stderr.read() == ""
        finally:
            server.kill()
    assert list(tmp_path.iterdir()) == []

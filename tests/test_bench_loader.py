"""The benchmark of the loader runs. Whether bars are met is for a quiet machine to say."""

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_loader.py"


@pytest.mark.ray
@pytest.mark.slow
def test_it_measures_everything() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    for figure in (
        "ours, Ray Data stream / best of Hugging Face", "resume at step 1,000,000",
        "prepare on Ray", "data wait of a step", "padding of prose at 2048",
    ):  # fmt: skip
        assert figure in done.stdout

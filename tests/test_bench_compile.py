"""The benchmark of compilation runs. What it gains is for a quiet machine to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_compile.py"
TINY = [
    "model.config.vocab_size=64", "model.config.hidden_size=32",
    "model.config.intermediate_size=64", "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=1", "training.max_seq_length=24",
    "training.batch_size=2", "training.gradient_accumulation_steps=1",
]  # fmt: skip


@pytest.mark.slow
def test_ten_combinations() -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, *TINY, "--stages", "stage2", "--steps", "2", "--json"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    lines = json.loads(done.stdout)
    assert len(lines) == len({line["combination"] for line in lines}) == 10
    skipped = {line["combination"] for line in lines if "skipped" in line}
    assert skipped == {"reduce-overhead", "max-autotune"}, "they record CUDA graphs"
    for line in lines:
        if "skipped" not in line:
            assert line["cosine"] > 1 - 1e-4 and line["steps_per_second"] > 0, line

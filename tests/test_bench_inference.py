"""The benchmark of inference runs. Figures are for a quiet machine to say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parent.parent / "scripts" / "bench_inference.py"


@pytest.mark.slow
def test_it_measures_every_type_and_every_mode() -> None:
    pytest.importorskip("llama_cpp")
    done = subprocess.run(
        [sys.executable, SCRIPT, "--quick", "--json"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout)
    modes = {row["mode"]: row for row in found if row["engine"] == "bitray"}
    assert set(modes) == {"autoregressive", "diffusion"} and modes["diffusion"]["speed"] > 0
    rows = {(row["engine"], row["type"]): row for row in found}
    for kind in ("f32", "f16", "bf16", "tq1_0", "tq2_0"):
        row = rows["llama.cpp", kind]
        assert row["speed"] > 0 and row["prompt"] > 0 and row["memory_mb"] > 0
    assert rows["bitray", "fp32 masters"]["speed"] > 0
    sizes = [rows["llama.cpp", kind]["size_mb"] for kind in ("tq1_0", "tq2_0", "f16", "f32")]
    assert sizes == sorted(sizes)
    assert "failed" in rows["bitnet.cpp", "i2_s"]

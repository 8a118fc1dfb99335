"""A stage whose micro-batch is found by trial, and which ends at a plateau, on the whole road."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from bitray import Config, checkpoint
from bitray.pipeline.identity import mathematical_settings
from bitray.pipeline.run import run
from bitray.settings import UserError

pytestmark = pytest.mark.ray
WORDS = (
    "pipeline=standard", "scaling.num_workers=1", "stages.stage1_9.max_steps=4", "export.gguf=[]",
    "export.huggingface=false", "stages.stage2.early_stopping.enabled=true",
    "stages.stage2.early_stopping.patience=1", "stages.stage2.early_stopping.min_evals=2",
    "stages.stage2.early_stopping.min_delta=9", "stages.stage2.auto_batch_size=true",
)  # fmt: skip


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_a_stage_with_the_largest_micro_batch_ends_at_its_plateau(
    configured: Callable[..., Config], capsys: pytest.CaptureFixture[str]
) -> None:
    """Six rows a step, of which nothing but memory keeps all from being one micro-batch; held-out
    losses after steps 5 and 10 do not fall by 9 nats."""
    # the words speak of Stage 0, which has to be there; with one step it costs little
    words = ["stages.stage0.max_steps=1" if w.startswith("pipeline=") else w for w in WORDS]
    config = configured("found", *words)
    small = config.override({"stages.stage2.memory_limit_gb": 0.01})
    with pytest.raises(UserError, match=r"stages\.stage2: not even one row of 64 tokens fits"):
        run(small)
    run(config)
    said = capsys.readouterr().out
    assert "stage2    micro-batch 6 x accumulation 1: the largest that fits" in said
    final = f"{config.run_dir}/stage2_checkpoint/checkpoints/final"
    position = checkpoint.load_state(final)["position"]
    assert position["step"] == 10 and "early stopping: in 1 evaluations" in position["ended"]
    assert position["ended"] in said
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    steps = [r["step"] for r in map(json.loads, lines) if r["stage"] == "stage2"]
    assert max(steps) == 10
    plain = config.override({"stages.stage2.auto_batch_size": False})
    assert mathematical_settings(plain) == mathematical_settings(config)
    run(config)
    assert "stage2    is complete" in capsys.readouterr().out

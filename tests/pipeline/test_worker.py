"""What a worker asks for; what it then does, the runs show."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import constants

from bitray import Config
from bitray.models.loading import build_model, save_model
from bitray.pipeline.worker import Stage
from bitray.training.loop import autocast_for

SHAPE = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture
def hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of the Hub as it lies when it was downloaded: `old` is all ones, `main` all twos."""
    root = tmp_path / "models--org--small"
    (root / "refs").mkdir(parents=True)
    for number, branch in enumerate(("old", "main"), 1):
        sha = str(number) * 40
        (root / "refs" / branch).write_text(sha)
        model = build_model(SHAPE)
        torch.nn.init.constant_(model.model.norm.weight, number)
        save_model(model, str(root / "snapshots" / sha))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "org/small"


@pytest.mark.parametrize(("path", "norm"), [(None, 1), ("org/other", 2)])
def test_the_teacher_is_of_the_models_revision_where_it_is_the_model(
    hub_model: str, tmp_path: Path, path: str | None, norm: int
) -> None:
    (tmp_path / "models--org--other").symlink_to(tmp_path / "models--org--small")
    words = ["model=smollm2_135m", f"model.path={hub_model}", "model.revision=old"]
    words += ["training=stage2_pretrain"] + ([f"model.teacher.path={path}"] if path else [])
    config, cpu = Config.load(overrides=words), torch.device("cpu")
    worker: Any = SimpleNamespace(
        settings=config.stages["stage2"], config=config, device=cpu,
        autocast=autocast_for(cpu, "fp32"),
    )  # fmt: skip
    teacher: Any = Stage.teacher(worker, SHAPE["vocab_size"])
    assert (teacher.model.model.norm.weight == norm).all()

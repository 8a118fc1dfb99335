"""What a worker asks for; what it then does, the runs show."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bitray import Config
from bitray.pipeline.worker import Stage
from bitray.training.loop import autocast_for


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
    teacher: Any = Stage.teacher(worker, 61)
    assert (teacher.model.model.norm.weight == norm).all()

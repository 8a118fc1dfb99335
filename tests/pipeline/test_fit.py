"""How a failure of Ray Train is told, and whether it is one of the settings."""

import errno
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ranks
import torch.distributed as dist
from ray.train import ControllerError, WorkerGroupError

from bitray import Config
from bitray.pipeline import fit as fit_module
from bitray.pipeline import worker
from bitray.pipeline.groups import Scaling
from bitray.pipeline.saving import Rewind
from bitray.pipeline.worker import Job
from bitray.retries import StorageGone
from bitray.settings import Passing, UserError


@pytest.mark.parametrize(
    ("failed", "kind", "told"),
    [
        (WorkerGroupError("", {1: RuntimeError("killed")}), Passing, "at last worker 1: killed"),
        (ControllerError(RuntimeError("gone")), Passing, "controller failed: .*gone"),
        (WorkerGroupError("", {0: StorageGone("s3://b: silent")}), Passing, "^s3://b: silent$"),
        (WorkerGroupError("", {0: OSError(errno.ENOSPC, "full", "/d")}), Passing, "^/d: full$"),
        (WorkerGroupError("", {0: Rewind("the gradient is not finite")}), UserError, "gradient"),
        ({"error": "lr: too high", "passing": False}, UserError, "^lr: too high$"),
        ({"error": "/d: full", "passing": True}, Passing, "^/d: full$"),
    ],
)
def test_what_ends_a_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failed: Any, kind: type, told: str
) -> None:
    def train() -> Any:
        if isinstance(failed, Exception):
            raise failed
        return SimpleNamespace(return_value=failed)

    monkeypatch.setattr(fit_module, "_trainer", lambda *_: SimpleNamespace(fit=train))
    job = object.__new__(Job)  # of which a failure asks for the folder alone
    config = Config.load(overrides=[f"output_dir={tmp_path}", "experiment=run"])
    object.__setattr__(job, "config", config)
    with pytest.raises(UserError, match=told) as caught:
        fit_module.fit(job, Scaling())
    assert type(caught.value) is kind


def _note() -> None:
    rank = dist.get_rank()
    worker.peak_memory_gb = lambda device: 1.0 + 2.0 * rank  # type: ignore[assignment]
    written: list[dict[str, float]] = []
    clock = worker.Clock(cause="influence")
    stage: Any = SimpleNamespace(device=None, clock=clock)
    position = SimpleNamespace(best=0.0)
    loop: Any = SimpleNamespace(position=position, write=written.append, sinks=())
    worker.Stage.note(stage, loop, {"code": 2.0})
    [told] = written
    assert told["eval/code_loss"] == 2.0 and told["train/peak_memory_gb"] == 3.0
    assert 0 < told["train/seconds"] < 60, "time of influence is time of training"


def test_an_evaluation_tells_the_memory_of_all_workers(tmp_path: Path) -> None:
    """What a worker other than the first takes counts too."""
    ranks.run(_note, tmp_path)

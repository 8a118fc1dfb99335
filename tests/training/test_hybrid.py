"""Parameters sharded inside a node and replicated between nodes: the numbers are the same."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
import torch.distributed as dist
from test_parallel import BLENDED, SHORT, loop, row, settings, tickets, whole

from bitray import Config
from bitray.data.tickets import Deal
from bitray.models.batch import Batch
from bitray.settings import UserError
from bitray.training import parallel
from bitray.training.gradients import gram_matrix
from bitray.training.parallel import world

NODES, EACH = 2, 2


def trained(hybrid: bool) -> dict[str, Any]:
    """Losses, weights, placements and a Gram matrix of five steps on all workers."""
    plain = parallel.parallelize
    pytest.MonkeyPatch().setattr(
        "test_parallel.parallelize", lambda *given: plain(*given, hybrid=hybrid)
    )
    given = settings(**SHORT | {"max_steps": 5})
    run, kept = loop(BLENDED, given)
    run.run(tickets(Deal(3, world()[1]), given.batch_size))
    rows = [row(500 + k) for k in range(4)]
    batch = Batch.from_rows(np.stack([i for i, _ in rows]), [n for _, n in rows], [0] * 4)
    first = next(run.model.parameters())
    placements = [str(p) for p in first.placements] if hasattr(first, "placements") else []
    return {
        "losses": kept.values,
        "weights": {name: whole(p) for name, p in run.model.model.named_parameters()},
        "gram": torch.from_numpy(gram_matrix(run, [batch, batch], 1.0)),
        "placements": placements,
    }


def on_nodes() -> dict[str, Any]:
    os.environ["LOCAL_WORLD_SIZE"] = str(EACH)
    found: dict[str, Any] = {"hybrid": trained(True)}
    os.environ["LOCAL_WORLD_SIZE"] = "4" if dist.get_rank() else "1"
    try:
        loop(BLENDED, settings(**SHORT))
    except Exception as error:
        found["refused"] = str(error)
    return found


@pytest.mark.slow
def test_hybrid_gives_the_numbers_of_one_worker(tmp_path: Path) -> None:
    found = ranks.run(on_nodes, tmp_path, size=NODES * EACH)[0]
    alone = trained(False)
    assert found["hybrid"]["placements"] == ["R", "S(0)"] and alone["placements"] == []
    np.testing.assert_allclose(found["hybrid"]["losses"], alone["losses"], rtol=1e-5)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(found["hybrid"]["weights"][name], weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["hybrid"]["gram"], alone["gram"], rtol=1e-3, atol=1e-6)
    assert "as many workers each" in found["refused"]


def test_optimizers_of_one_axis_are_refused() -> None:
    with pytest.raises(UserError, match="hybrid, but muon of stages"):
        Config.load(overrides=["scaling.sharding=hybrid", "training.optimizer.type=muon"])

"""Held-out losses of a run: taken on its workers, kept in its folder for the table."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from bitray import storage
from bitray.data.packing import PackedRows
from bitray.inference.evaluation import evaluate
from bitray.models.batch import Batch
from bitray.models.losses import LossModel
from bitray.training import goodput
from bitray.training.goodput import Clock
from bitray.training.parallel import on_rank_zero

EVALUATIONS = "evaluations.json"
ORIGINAL, CONVERTED = "original", "converted"
"""Evaluations that belong to no stage: the pretrained model, and its ternary self untrained."""


@dataclass(frozen=True)
class HeldOut:
    """The rows to evaluate on, on one worker."""

    run_dir: str
    batches: Mapping[str, list[Batch]]
    """By domain."""
    device: torch.device
    autocast: torch.autocast
    clock: Clock

    @goodput.counted("evaluation")
    def losses(self, model: LossModel, batches: int | None = None) -> dict[str, float]:
        """Loss per domain at strength 1, on so many batches of each or on all."""
        some = {name: found[:batches] for name, found in self.batches.items()}
        return evaluate(model, some, self.device, self.autocast)

    def record(self, name: str, losses: Mapping[str, float]) -> None:
        """Keep an evaluation for the table of the run; every worker calls it."""

        def keep() -> None:
            known = read_evaluations(self.run_dir)
            uri = storage.join(self.run_dir, EVALUATIONS)
            storage.write_json(uri, {**known, name: dict(losses)})

        on_rank_zero(keep)


def read_evaluations(run_dir: str) -> dict[str, dict[str, float]]:
    """Name of a stage (or `original`, `converted`) -> domain -> held-out loss."""
    uri = storage.join(run_dir, EVALUATIONS)
    return storage.read_json(uri) if storage.exists(uri) else {}


def batches_of(rows: Mapping[str, PackedRows], size: int) -> dict[str, list[Batch]]:
    """Rows of each domain as batches."""
    return {
        name: [found.part(at, at + size).batch() for at in range(0, len(found.lengths), size)]
        for name, found in rows.items()
    }

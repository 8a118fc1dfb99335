"""Learning curves of real tiny trials of Stages 1.9 and 2 on a grid of settings, as a table.

`bench_search.py` searches it, interpolated, in no time. A model of 80,000 parameters is pretrained
on the embedded corpus; then each trial trains 20 steps of Stage 1.9 and 60 of Stage 2 in this
process. `noise` is what the loss of the best point scatters by over seeds of the order of rows.

    python scripts/record_surface.py scripts/surface.json      # about ten minutes of one core
"""

import argparse
import copy
import itertools
import json
import statistics
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compare_recipes import CPU, EXACT, Comparison
from transformers import PreTrainedModel

from bitray.models.convert import to_bitnet
from bitray.models.losses import LossModel
from bitray.training.loop import Every, Loop
from bitray.training.state import Position
from bitray.training.teacher import InProcessTeacher

WORDS = (
    "model.config.vocab_size=512", "model.config.hidden_size=64",
    "model.config.intermediate_size=128", "training.max_seq_length=64", "training.batch_size=8",
    "training.gradient_accumulation_steps=1",
    "stages.stage0.max_steps=400", "data.sources.code.max_bytes=200000",
    "data.sources.prose.max_bytes=200000", "data.sources.arithmetic.max_bytes=100000",
)  # fmt: skip
AXES = {
    "stages.stage1_9.optimizer.lr": [5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
    "stages.stage2.optimizer.lr": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
    "stages.stage2.objectives.logits_distill.temperature": [1.0, 2.0, 5.0],
}
STEPS = {"stage1_9": 20, "stage2": 60}
EVALUATE = 10
NOISE_SEEDS = 5


def stage(
    made: Comparison, name: str, model: PreTrainedModel, teacher: Any, seed: int, **said: Any
) -> Iterator[float]:
    """Train a stage in place; held-out losses at strength 1 on the way."""
    losses: list[float] = []
    settings = made.stage(name, STEPS[name], said)
    before = made.config.stages["stage0"].total_steps + (name == "stage2") * STEPS["stage1_9"]
    wrapped, strength = LossModel(model), float(name == "stage2")
    position = Position(strength=strength, initial_strength=strength)
    hooks = [Every(EVALUATE, lambda loop: losses.append(made.loss(model)))]
    optimizer = settings.optimizer.build(wrapped)
    loop = Loop(name, wrapped, optimizer, settings, CPU, EXACT, teacher, position, hooks)
    loop.run(made.tickets(seed, settings, before))
    return iter(losses)


def curves(made: Comparison, seed: int, *axes: list[float]) -> np.ndarray:
    """Losses `[lr of 1.9, lr of 2, temperature, evaluation]`; infinite: not reached."""
    dense = made.teacher(0)
    teacher = InProcessTeacher(copy.deepcopy(dense).requires_grad_(False), EXACT)
    found = np.full([*map(len, axes), sum(STEPS.values()) // EVALUATE], np.inf)
    for i, lr in enumerate(axes[0]):
        model = to_bitnet(made.teacher(0), "none", None)
        warm = {"optimizer.lr": lr, "lambda_warmup.warmup_steps": STEPS["stage1_9"]}
        first = list(stage(made, "stage1_9", model, teacher, seed, **warm))
        for (j, lr2), (k, t) in itertools.product(enumerate(axes[1]), enumerate(axes[2])):
            said = {"optimizer.lr": lr2, "objectives.logits_distill.temperature": t}
            second = stage(made, "stage2", copy.deepcopy(model), teacher, seed, **said)
            found[i, j, k] = [*first, *second]
            print(f"{lr:g} {lr2:g} {t:g}: {found[i, j, k, -1]:.4f}", flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file")
    parser.add_argument("--quick", action="store_true", help="the corners alone")
    said = parser.parse_args()
    torch.set_num_threads(1)
    axes = [values[:: len(values) - 1] if said.quick else values for values in AXES.values()]
    with tempfile.TemporaryDirectory() as folder:
        made = Comparison(WORDS, sum(STEPS.values()), folder)
        made.prepare()
        found = curves(made, 1, *axes)
        best = np.unravel_index(found[..., -1].argmin(), found.shape[:-1])
        point = [[values[at]] for values, at in zip(axes, best, strict=True)]
        again = [float(curves(made, 2 + n, *point)[0, 0, 0, -1]) for n in range(NOISE_SEEDS)]
    tokens = EVALUATE * 8 * 64
    table = {
        "made_by": f"scripts/record_surface.py, torch {torch.__version__}, one thread",
        "axes": dict(zip(AXES, axes, strict=True)),
        "tokens": [tokens * (n + 1) for n in range(found.shape[-1])],
        "noise": round(statistics.stdev(again), 4),
        "loss": found.round(4).tolist(),
    }
    Path(said.file).write_text(json.dumps(table) + "\n")


if __name__ == "__main__":
    main()

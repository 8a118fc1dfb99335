"""What low-rank corrections are worth on a trained ternary model, at equal extra tokens.

A teacher and its ternary student are trained as `compare_recipes.py` does it. Then the student is
trained on as before, or gets corrections, which alone are trained. Also told: what each start of
the corrections does at once, on that student and on a teacher that was only rounded.

  python scripts/compare_corrections.py --seeds 1 2 3 --steps 60 --extra 30
"""

import argparse
import copy
import itertools
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from typing import Any

from compare_recipes import AT_ONCE, EXACT, Comparison, train
from transformers import PreTrainedModel

from bitray.data.shards import held_out
from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.low_rank import add_corrections, closed_form, svd_start, train_corrections_only
from bitray.training.teacher import InProcessTeacher

MSE = {
    **AT_ONCE,
    "objectives.continue_pretrain.weight": 0.0,
    "objectives.logits_distill.weight": 0.0,
    "objectives.hidden_distill.weight": 1.0,
    "objectives.hidden_distill.loss_type": "mse",
}
ARMS: dict[str, dict[str, Any] | None] = {
    "trained on, no corrections": None,
    "corrections, hidden mse": MSE,
    "corrections, ce + logits": AT_ONCE,
}


def corrected(model: PreTrainedModel, rank: float) -> PreTrainedModel:
    """A copy with corrections that change nothing yet."""
    model = copy.deepcopy(model)
    add_corrections(model, rank)
    return model


def of_seed(made: Comparison, seed: int, extra: int, rank: float) -> dict[str, float]:
    """Held-out losses by what was done."""
    import torch

    torch.set_num_threads(1)
    dense = made.teacher(seed)
    teacher = InProcessTeacher(copy.deepcopy(dense).requires_grad_(False), EXACT)
    weights = {name: value.clone() for name, value in dense.state_dict().items()}
    calibration = next(iter(held_out(made.shards, "probe").values())).batch()
    found = {"teacher": made.loss(dense)}
    student = to_bitnet(dense, "none")
    at_once = starts(made, student, weights, calibration, rank)
    found |= {f"rounded{name}": loss for name, loss in at_once.items()}
    step = made.config.stages["stage0"].total_steps
    stage = made.stage("stage2", made.steps, AT_ONCE)
    train(student, stage, made.tickets(seed, stage, step), teacher)
    at_once = starts(made, student, weights, calibration, rank)
    found |= {f"trained{name}": loss for name, loss in at_once.items()}
    for name, changes in ARMS.items():
        model = copy.deepcopy(student)
        if changes is not None:
            model = corrected(student, rank)
            train_corrections_only(model)
        stage = made.stage("stage2", extra, changes or AT_ONCE)
        train(model, stage, made.tickets(seed, stage, step + made.steps), teacher)
        found[f"then {extra} steps: {name}"] = made.loss(model)
    return found


def starts(
    made: Comparison,
    student: PreTrainedModel,
    weights: dict[str, Any],
    batch: Batch,
    rank: float,
) -> dict[str, float]:
    """Losses with the corrections as they start."""
    found = {"": made.loss(student)}
    model = corrected(student, rank)
    svd_start(model, weights)
    found[", svd"] = made.loss(model)
    closed_form(model, weights, batch)
    return {**found, ", closed form": made.loss(model)}


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60, help="of the ternary student")
    parser.add_argument("--extra", type=int, default=30, help="steps of every arm after them")
    parser.add_argument("--rank", type=float, default=0.1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("words", nargs="*", help="overrides of the demo configuration")
    said = parser.parse_intermixed_args()
    with tempfile.TemporaryDirectory() as folder:
        made = Comparison(tuple(said.words), said.steps, folder)
        made.prepare()
        common = (itertools.repeat(each) for each in (said.extra, said.rank))
        with ProcessPoolExecutor(said.processes) as pool:
            found = list(pool.map(of_seed, itertools.repeat(made), said.seeds, *common))
    width = max(map(len, found[0]))
    for name in found[0]:
        losses = [each[name] for each in found]
        numbers = "".join(f"  {loss:7.4f}" for loss in losses)
        print(f"{name:<{width}}{numbers}   mean {statistics.mean(losses):7.4f}")


if __name__ == "__main__":
    main()

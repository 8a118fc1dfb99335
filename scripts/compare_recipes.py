"""What each part of a recipe is worth: ternary models of one teacher, at equal tokens, on the CPU.

A small teacher is pretrained on the embedded corpus. Then every recipe starts from it and sees the
same rows in the same order. Reported are the held-out loss at strength 1, mean over domains, and
how much of the gap between the ternary model trained by cross-entropy alone and the dense model
trained on is closed, by seed and on average. Differences under 0.01 are ties. No Ray: the plan is
read in this process. With `--check` exit code 1 if a recipe closes less than the bar.

  python scripts/compare_recipes.py --seeds 1 2 3 --steps 80
  python scripts/compare_recipes.py --only dense ce logits --seeds 1 2 --check
"""

import argparse
import copy
import itertools
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from bitray import Config
from bitray.data.job import plan_job
from bitray.data.manifest import read_manifest
from bitray.data.plan import MixturePlan, opening
from bitray.data.preparation import run_job
from bitray.data.reader import PlanReader
from bitray.data.shards import Shards, held_out
from bitray.data.tokenizer import train_tokenizer
from bitray.data.units import documents, in_process
from bitray.inference import evaluate
from bitray.models.batch import Batch
from bitray.models.convert import SubLNChoice, to_bitnet
from bitray.models.loading import build_model
from bitray.models.losses import LossModel
from bitray.training.loop import Loop, autocast_for, mean_loss
from bitray.training.settings import TrainingSettings
from bitray.training.state import Position
from bitray.training.teacher import InProcessTeacher

CPU = torch.device("cpu")
EXACT = autocast_for(CPU, "fp32")
Tickets = Iterator[tuple[int, Batch]]
Changes = Mapping[str, Any]
"""Overrides of a stage."""
ENDS = ("dense", "ce")
"""The recipes that the gap lies between."""
EACH, MEAN = 0.40, 0.50
"""Share of the gap that distillation has to close on each seed, and on average."""

ALONE: Changes = {
    "objectives.continue_pretrain.weight": 1.0,
    "objectives.logits_distill.weight": 0.0,
}
AT_ONCE: Changes = {"lambda_warmup.enabled": False}
WARM: Changes = {"lambda_warmup.enabled": True}


@dataclass(frozen=True)
class Recipe:
    """Stage 2 as in the demo but for `changes`; where `first` is given, a quarter of the steps are
    spent on Stage 1.9 before."""

    changes: Changes
    first: Changes | None = None
    subln: SubLNChoice = "none"
    calibrated: bool = False
    dense: bool = False


def _matrices(kind: str, lr: float) -> Changes:
    """An optimizer of matrices, at the best of three rates; what is left to AdamW has its rate."""
    return {"optimizer.type": kind, "optimizer.lr": lr, "optimizer.adamw_lr": 1e-3}


LOGITS = AT_ONCE
RECIPES: dict[str, Recipe] = {
    "dense": Recipe(ALONE, dense=True),
    "ce": Recipe({**ALONE, **AT_ONCE}),
    "ce, warm-up": Recipe({**ALONE, **WARM}),
    "ce, warm-up, subln ones": Recipe({**ALONE, **WARM}, subln="paper"),
    "ce, warm-up, subln calibrated": Recipe({**ALONE, **WARM}, subln="paper", calibrated=True),
    "stage 1.9, ce": Recipe({**ALONE, **AT_ONCE}, first={}),
    "logits": Recipe(LOGITS),
    "stage 1.9, logits": Recipe(LOGITS, first={}),
    "logits, subln calibrated": Recipe(LOGITS, subln="paper", calibrated=True),
    "logits, attention": Recipe({**LOGITS, "objectives.attention_distill.weight": 1.0}),
    "logits, saliency": Recipe({**LOGITS, "saliency_curriculum.enabled": True}),
    "logits, q-sparse": Recipe({**LOGITS, "activation_sparsity.enabled": True}),
    "logits, muon": Recipe({**LOGITS, **_matrices("muon", 2.4e-3)}),
    "logits, muonclip": Recipe({**LOGITS, **_matrices("muonclip", 2.4e-3)}),
    "logits, apollo": Recipe({**LOGITS, **_matrices("apollo", 3e-3)}),
    "logits, adamw 8-bit": Recipe({**LOGITS, "optimizer.type": "adamw_8bit", "optimizer.lr": 1e-3}),
}


@dataclass(frozen=True)
class Comparison:
    """What all recipes have in common."""

    words: tuple[str, ...]
    steps: int
    folder: str

    @cached_property
    def config(self) -> Config:
        """The demo's, changed by the words."""
        return Config.load(None, list(self.words))

    @cached_property
    def shards(self) -> Shards:
        """The embedded corpus, prepared by `prepare`."""
        manifest = read_manifest(self.folder)
        assert manifest is not None
        return Shards(self.folder, manifest)

    def prepare(self) -> None:
        """Pack the corpus, once."""
        data, size = self.config.data, (self.config.model.config or {})["vocab_size"]
        length = max(stage.max_seq_length for stage in self.config.stages.values())
        tokenizer = train_tokenizer(documents(data), size)
        run_job(plan_job(data, tokenizer, length, self.folder), in_process)

    def stage(self, name: str, steps: int, changes: Changes) -> TrainingSettings:
        """A stage of the demo, so long and with these changes."""
        given = {"max_steps": steps, "log_every": 10**9, **changes}
        return self.config.override(
            {f"stages.{name}.{key}": value for key, value in given.items()}
        ).stages[name]

    def tickets(self, seed: int, stage: TrainingSettings, first_step: int) -> Tickets:
        """Micro-batches from a step on."""
        sizes = self.shards.manifest.sizes()
        plan = MixturePlan(seed, sizes, [opening(sizes, self.config.data.shares())])
        per_step = stage.gradient_accumulation_steps
        reader = PlanReader(plan, self.shards, stage.batch_size, tickets_per_step=per_step)
        for ticket, batch in reader.batches(first_step * per_step):
            yield ticket - first_step * per_step, batch

    def loss(self, model: PreTrainedModel) -> float:
        """Mean over domains of the held-out loss, at strength 1."""
        found = held_out(self.shards, "validation")
        domains = {name: [rows.batch()] for name, rows in found.items()}
        return mean_loss(evaluate(LossModel(model), domains, CPU, EXACT))

    # ---------------------------------------------------------------------------------- arms

    def teacher(self, seed: int) -> PreTrainedModel:
        """The dense model that all recipes of a seed begin with, trained once."""
        assert self.config.model.config is not None
        model, file = build_model(self.config.model.config), Path(self.folder, f"teacher-{seed}.pt")
        if file.exists():
            model.load_state_dict(torch.load(file, weights_only=True))
            return model
        torch.manual_seed(seed)
        model = build_model(self.config.model.config)
        stage = self.config.stages["stage0"]
        train(model, stage, self.tickets(seed, stage, 0))
        torch.save(model.state_dict(), file)
        return model

    def follow(self, recipe: Recipe, seed: int) -> float:
        """The held-out loss that a recipe ends with."""
        dense = self.teacher(seed)
        teacher = InProcessTeacher(copy.deepcopy(dense).requires_grad_(False), EXACT)
        step = self.config.stages["stage0"].total_steps
        model = dense
        if not recipe.dense:
            some = held_out(self.shards, "probe") if recipe.calibrated else {}
            rows = next(iter(some.values())).batch() if some else None
            model = to_bitnet(dense, recipe.subln, rows)
        quarter = self.steps // 4 if recipe.first is not None else 0
        stages = [("stage2", self.steps - quarter, recipe.changes)]
        if recipe.first is not None:
            warm = {"lambda_warmup.warmup_steps": quarter, **recipe.first}
            stages.insert(0, ("stage1_9", quarter, warm))
        for name, steps, changes in stages:
            stage = self.stage(name, steps, changes)
            train(model, stage, self.tickets(seed, stage, step), teacher)
            step += steps
        return self.loss(model)


def train(
    model: PreTrainedModel,
    stage: TrainingSettings,
    tickets: Tickets,
    teacher: InProcessTeacher | None = None,
) -> None:
    """One stage, in place, from the strength that its warm-up begins with."""
    wrapped = LossModel(model, stage.logits_chunk)
    optimizer = stage.optimizer.build(wrapped)
    Loop("stage", wrapped, optimizer, stage, CPU, EXACT, teacher, Position()).run(tickets)


# --------------------------------------------------------------------------------------- figures


@cache
def _one_thread() -> None:
    torch.set_num_threads(1)


def pretrain(made: Comparison, seed: int) -> float:
    """Of a worker process: the loss of a teacher."""
    _one_thread()
    return made.loss(made.teacher(seed))


def follow(made: Comparison, name: str, seed: int) -> float:
    """Of a worker process: the loss of a recipe; NaN where training breaks down."""
    _one_thread()
    try:
        return made.follow(RECIPES[name], seed)
    except FloatingPointError as broken:
        print(f"{name}, seed {seed}: {broken}", flush=True)
        return math.nan


@dataclass
class Found:
    """Losses by recipe and seed."""

    seeds: Sequence[int]
    teachers: Mapping[int, float]
    losses: dict[str, dict[int, float]] = field(default_factory=dict)

    def closed(self, name: str) -> list[float]:
        """Shares of the gap between cross-entropy alone and dense training."""
        dense, alone = self.losses["dense"], self.losses["ce"]
        mine = self.losses[name]
        return [(alone[s] - mine[s]) / (alone[s] - dense[s]) for s in self.seeds]

    def below_bar(self) -> list[str]:
        """Recipes that close less of the gap than they should, or break down."""
        return [name for name in self.losses if name not in ENDS and not self._passes(name)]

    def _passes(self, name: str) -> bool:
        shares = self.closed(name)
        return all(share >= EACH for share in shares) and statistics.mean(shares) >= MEAN

    def table(self) -> str:
        """One line a recipe: the loss of each seed and their mean, the gap closed likewise."""
        width, known = max(map(len, self.losses)), set(ENDS) <= self.losses.keys()
        lines = [f"{'':<{width}}" + "".join(f"  seed {s:<3}" for s in self.seeds) + "    mean"]
        lines[0] += "  gap closed, its mean" if known else ""
        for name, by_seed in {"teacher": self.teachers, **self.losses}.items():
            found = [by_seed[seed] for seed in self.seeds]
            line = f"{name:<{width}}" + "".join(f"  {loss:8.4f}" for loss in found)
            line += f"{statistics.mean(found):8.4f}"
            if name in self.losses and known:
                shares = self.closed(name)
                line += "".join(f"{share:6.0%}" for share in [*shares, statistics.mean(shares)])
            lines.append(line)
        return "\n".join(lines)


def compare(made: Comparison, names: Sequence[str], seeds: Sequence[int], processes: int) -> Found:
    """All recipes on all seeds, several at a time."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context) as pool:
        teachers = pool.map(pretrain, itertools.repeat(made), seeds)
        found = Found(seeds, dict(zip(seeds, teachers, strict=True)))
        pairs = list(itertools.product(names, seeds))
        losses = pool.map(follow, itertools.repeat(made), *zip(*pairs, strict=True))
        for (name, seed), loss in zip(pairs, losses, strict=True):
            found.losses.setdefault(name, {})[seed] = loss
            print(f"{name}, seed {seed}: {loss:.4f}", flush=True)
    return found


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=60, help="after pretraining, of every recipe")
    parser.add_argument("--only", nargs="+", choices=RECIPES, metavar="RECIPE", default=[*RECIPES])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", action="store_true")
    bar = f"exit code 1 unless all close {EACH} of the gap on every seed and {MEAN} on average"
    parser.add_argument("--check", action="store_true", help=bar)
    parser.add_argument("words", nargs="*", help="overrides of the demo configuration")
    said = parser.parse_intermixed_args()
    if said.check and not set(ENDS) < set(said.only):
        parser.error(f"--check compares recipes with {' and '.join(ENDS)}: name those with --only")
    with tempfile.TemporaryDirectory() as folder:
        made = Comparison(tuple(said.words), said.steps, folder)
        made.prepare()
        found = compare(made, said.only, said.seeds, said.processes)
    print(json.dumps(found.losses) if said.json else found.table())
    if said.check and (below := found.below_bar()):
        sys.exit(f"too little of the gap is closed: {', '.join(below)}")


if __name__ == "__main__":
    main()

"""A small run, what it leaves in its folder, and the same training in process by one worker."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from keep import Keep
from transformers import PreTrainedModel

from bitray import Config
from bitray.data.manifest import read_manifest
from bitray.data.plan import MixturePlan, SourceSize, opening
from bitray.data.reader import PlanReader
from bitray.data.shards import Shards
from bitray.models.loading import build_model, load_model, load_teacher
from bitray.models.losses import LossModel
from bitray.pipeline.finish import Result
from bitray.pipeline.material import Material
from bitray.training import state
from bitray.training.loop import Loop, autocast_for, seed_of
from bitray.training.state import Position
from bitray.training.teacher import InProcessTeacher

JOB = Path(__file__).parents[2] / "jobs" / "pretrain.py"
CPU = torch.device("cpu")
TRAINED = ("stage0", "stage1_9", "stage2")


def drive(words: Sequence[str], log: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The job as a user starts it, in a process group of its own, as a terminal gives it."""
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, str(JOB), *words],
        stdout=log.open("ab"), stderr=subprocess.STDOUT, start_new_session=True,
        env={**inherited, **environment},
    )  # fmt: skip


class Road:
    """A run, and what it left in its folder."""

    def __init__(self, config: Config, result: Result | None = None) -> None:
        self.config = config
        self.folder = Path(config.run_dir)
        self.result = result or Result(config.run_dir)

    def checkpoints(self, stage: str) -> Path:
        return self.folder / f"{stage}_checkpoint" / "checkpoints"

    def final(self, stage: str) -> str:
        return str(self.checkpoints(stage) / "final")

    def lines(self, stage: str) -> list[dict[str, Any]]:
        """The lines of `metrics.jsonl` that a stage wrote."""
        found = map(json.loads, (self.folder / "metrics.jsonl").read_text().splitlines())
        return [line for line in found if line["stage"] == stage]

    def metrics(self, stage: str, name: str = "train/loss") -> list[float]:
        """A metric of a stage, step by step."""
        return [line[name] for line in self.lines(stage) if name in line]

    def reached(self, stage: str = "stage0") -> int:
        """The last step that a stage has told of so far."""
        told = (self.folder / "metrics.jsonl").exists()
        return max([line["step"] for line in self.lines(stage)] if told else [0], default=0)

    def json(self, name: str) -> Any:
        return json.loads((self.folder / name).read_text())

    @cached_property
    def shards(self) -> Shards:
        """The rows that all stages of this run were prepared with."""
        (root,) = set(Material(self.config).folders.values())
        manifest = read_manifest(root)
        assert manifest is not None
        return Shards(root, manifest)

    @property
    def sizes(self) -> dict[str, SourceSize]:
        """Of every source, what there is to train on."""
        return {
            name: SourceSize(source.splits["train"].rows, source.splits["train"].tokens)
            for name, source in self.shards.manifest.sources.items()
        }

    def plans(self) -> dict[str, MixturePlan]:
        """The order of rows of every stage, from settings and manifest alone; each stage goes on
        in the sources where the one before it ended."""
        sizes = self.sizes
        weights = {name: source.weight for name, source in self.config.data.sources.items()}
        given: Mapping[str, int] = {}
        plans = {}
        for stage in TRAINED:
            plan = MixturePlan(self.config.data.seed, sizes, [opening(sizes, weights, given)])
            settings = self.config.stages[stage]
            rows = settings.total_steps * settings.rows_per_step
            given = dict(zip(plan.sources, plan.cursors(rows), strict=True))
            plans[stage] = plan
        return plans


def alone(
    road: Road, stage: str, start: PreTrainedModel | None = None, resumed: str | None = None
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Losses and final weights of a stage trained here, by one worker without Ray, from the
    predecessor's checkpoint (or from `start`), or from the middle (`resumed`)."""
    torch.set_num_threads(1)  # as Ray's workers have
    settings = road.config.stages[stage]
    torch.manual_seed(seed_of(settings.seed, stage))
    strength, teacher = {"stage0": 0.0, "stage1_9": 0.0, "stage2": 1.0}[stage], None
    if start is None and stage == "stage0":
        assert road.config.model.config is not None
        start = build_model(road.config.model.config)
    start = start or load_model(road.final({"stage1_9": "stage1", "stage2": "stage1_9"}[stage]))
    if stage != "stage0":
        dense = load_teacher(road.final("stage0"), torch.float32, CPU)
        teacher = InProcessTeacher(dense, autocast_for(CPU, "auto"))
    model, kept = LossModel(start, settings.logits_chunk), Keep()
    optimizer = settings.optimizer.build(model)
    position, step = Position(strength=strength, initial_strength=strength), 0
    if resumed:
        position, data = state.resume(resumed, model, optimizer, settings.resume)
        step = data["step"] if data else 0
    loop = Loop(
        stage, model, optimizer, settings, CPU, autocast_for(CPU, "auto"), teacher, position,
        sinks=[kept], data_step=step,
    )  # fmt: skip
    reader = PlanReader(
        road.plans()[stage], road.shards, settings.batch_size,
        tickets_per_step=settings.gradient_accumulation_steps,
    )  # fmt: skip
    loop.run(reader.batches(step * settings.gradient_accumulation_steps))
    return kept.values, {name: value.clone() for name, value in model.model.state_dict().items()}


def weights(checkpoint: str) -> dict[str, torch.Tensor]:
    """All tensors of the model in a checkpoint."""
    return dict(load_model(checkpoint).state_dict())


def differing(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> Sequence[str]:
    """Names of tensors that are not bit-equal."""
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def wait_for(path: Path, seconds: float = 240) -> None:
    """Until a file is there."""
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.01)

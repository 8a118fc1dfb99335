"""Does distillation pay? The demo's recipe against plain training, at equal tokens, on the CPU.

A small teacher is pretrained on the embedded corpus; then, from the same teacher, on the same rows:
the dense model is trained on, the ternary one with cross-entropy alone, and the ternary one by the
demo's Stages 1.9 and 2. Reported is how much of the gap between plain ternary and dense training
the distillation closes. No Ray: the plan is read in this process.

  python scripts/compare_distillation.py --seeds 1 2 --steps 60
"""

import argparse
import copy
import json
import tempfile
from collections.abc import Iterator

import torch
from transformers import PreTrainedModel

from bitray import Config
from bitray.data.job import plan_job
from bitray.data.manifest import Manifest
from bitray.data.plan import MixturePlan, opening
from bitray.data.preparation import run_job
from bitray.data.reader import PlanReader
from bitray.data.shards import Shards, held_out
from bitray.data.tokenizer import train_tokenizer
from bitray.data.units import documents, in_process
from bitray.inference import evaluate
from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.models.losses import LossModel
from bitray.training.loop import Loop, autocast_for, mean_loss
from bitray.training.settings import TrainingSettings
from bitray.training.state import Position
from bitray.training.teacher import InProcessTeacher

CPU = torch.device("cpu")
EXACT = autocast_for(CPU, "fp32")
Tickets = Iterator[tuple[int, Batch]]


class Corpus:
    """The embedded corpus, prepared, in the order of one seed."""

    def __init__(self, config: Config, folder: str) -> None:
        self.config = config
        size = config.model.config["vocab_size"] if config.model.config else 0
        tokenizer = train_tokenizer(documents(config.data), size)
        self.length = max(stage.max_seq_length for stage in config.stages.values())
        job = plan_job(config.data, tokenizer, self.length, folder)
        self.manifest: Manifest = run_job(job, in_process)
        self.shards = Shards(folder, self.manifest)

    def tickets(self, seed: int, stage: TrainingSettings, first_step: int = 0) -> Tickets:
        """Micro-batches from a step on."""
        sizes = self.manifest.sizes()
        plan = MixturePlan(seed, sizes, [opening(sizes, self.config.data.shares())])
        per_step = stage.gradient_accumulation_steps
        reader = PlanReader(plan, self.shards, stage.batch_size, tickets_per_step=per_step)
        for ticket, batch in reader.batches(first_step * per_step):
            yield ticket - first_step * per_step, batch

    def losses(self, model: PreTrainedModel) -> float:
        """Mean over domains of the held-out loss, at strength 1."""
        found = held_out(self.shards, "validation")
        domains = {name: [rows.batch()] for name, rows in found.items()}
        return mean_loss(evaluate(LossModel(model), domains, CPU, EXACT))


def train(
    model: PreTrainedModel,
    stage: TrainingSettings,
    tickets: Tickets,
    teacher: InProcessTeacher | None = None,
    strength: float = 1.0,
) -> None:
    """One stage, in place."""
    wrapped = LossModel(model, stage.logits_chunk)
    position = Position(strength=strength, initial_strength=strength)
    optimizer = stage.optimizer.build(wrapped)
    Loop("stage", wrapped, optimizer, stage, CPU, EXACT, teacher, position).run(tickets)


def compare(config: Config, corpus: Corpus, seed: int, steps: int) -> dict[str, float]:
    """Held-out loss of every arm for one seed."""
    stages = config.stages
    torch.manual_seed(seed)
    assert config.model.config is not None
    dense = build_model(config.model.config)
    train(dense, stages["stage0"], corpus.tickets(seed, stages["stage0"]))
    found = {"teacher": corpus.losses(dense)}
    ternary = to_bitnet(copy.deepcopy(dense), "none")
    found["rounded"] = corpus.losses(ternary)
    teacher = InProcessTeacher(copy.deepcopy(dense).requires_grad_(False), EXACT)

    quarter = steps // 4
    plain = config.override(
        {
            "stages.stage2.max_steps": steps,
            "stages.stage2.objectives.logits_distill.weight": 0,
            "stages.stage2.objectives.continue_pretrain.weight": 1,
        }
    ).stages["stage2"]
    distilled = config.override(
        {
            "stages.stage1_9.max_steps": quarter,
            "stages.stage1_9.lambda_warmup.warmup_steps": quarter,
            "stages.stage2.max_steps": steps - quarter,
        }
    ).stages
    after = stages["stage0"].total_steps
    rows = {name: corpus.tickets(seed, plain, after) for name in ("dense", "plain", "first")}

    train(dense, plain, rows["dense"])
    found["dense"] = corpus.losses(dense)
    student = copy.deepcopy(ternary)
    train(student, plain, rows["plain"])
    found["plain"] = corpus.losses(student)
    train(ternary, distilled["stage1_9"], rows["first"], teacher, strength=0.0)
    second = corpus.tickets(seed, plain, after + quarter)
    train(ternary, distilled["stage2"], second, teacher)
    found["distilled"] = corpus.losses(ternary)
    gap = found["plain"] - found["dense"]
    found["closed"] = (found["plain"] - found["distilled"]) / gap
    return found


def main() -> None:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--steps", type=int, default=60, help="after pretraining, of every arm")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("words", nargs="*", help="overrides of the demo configuration")
    said = parser.parse_intermixed_args()
    config = Config.load(None, said.words)
    with tempfile.TemporaryDirectory() as folder:
        corpus = Corpus(config, folder)
        found = {}
        for seed in said.seeds:
            found[seed] = compare(config, corpus, seed, said.steps)
            shown = "  ".join(f"{name} {value:.4f}" for name, value in found[seed].items())
            print(f"seed {seed}: {shown}", flush=True)
    mean = sum(each["closed"] for each in found.values()) / len(found)
    print(json.dumps(found) if said.json else f"gap closed, mean over seeds: {mean:.0%}")


if __name__ == "__main__":
    main()

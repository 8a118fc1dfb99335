"""Cross-entropy and block diffusion trained together, through the loop; on one worker and two."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from torch import Tensor

from bitray.data.tickets import EMPTY, Deal
from bitray.inference import Diffusion, Sampling
from bitray.inference.diffusion import diffuse
from bitray.inference.generation import tokens
from bitray.models.batch import IGNORED, Batch
from bitray.models.convert import to_bitnet
from bitray.models.diffusion import eligible, masked_batch
from bitray.models.loading import build_model
from bitray.models.losses import LossModel, Term
from bitray.nn import set_strength
from bitray.objectives import DLM, ContinuePretrain
from bitray.training.loop import Loop, autocast_for
from bitray.training.parallel import parallelize, world
from bitray.training.settings import TrainingSettings
from bitray.training.teacher import InProcessTeacher

CPU = torch.device("cpu")
VOCABULARY, MASK, END, WIDTH, BLOCK = 40, 39, 0, 48, 8
CONFIG = {
    "model_type": "llama", "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
OBJECTIVES = {
    "continue_pretrain": {"weight": 1.0}, "dlm": {"weight": 0.5, "block": BLOCK},
    "tcs_distill": {"weight": 0.3, "top_k": 10}, "logits_distill": {"weight": 0.2},
    "hidden_distill": {"weight": 0.1},
}  # fmt: skip


def settings(**changes: Any) -> TrainingSettings:
    return TrainingSettings.model_validate({
        "max_steps": 8, "batch_size": 4, "gradient_accumulation_steps": 3, "max_seq_length": WIDTH,
        "log_every": 1, "optimizer": {"type": "adamw", "lr": 3e-5}, "objectives": OBJECTIVES,
        "lambda_warmup": {"warmup_steps": 6},
    } | changes)  # fmt: skip


def row(number: int) -> tuple[np.ndarray, list[int]]:
    """Documents that count up in steps of 1 to 3 from anywhere, and end."""
    draw, ids, lengths = np.random.default_rng(number), [], []
    for length in ([48], [20, 28], [9, 17, 15], [30])[number % 4]:
        start, step = draw.integers(0, 38), draw.integers(1, 4)
        ids += [*((start + step * np.arange(length - 1)) % 38 + 1), END]
        lengths.append(length)
    return np.array(ids + [0] * (WIDTH - len(ids)), np.int32), lengths


def tickets(deal: Deal, rows: int) -> Iterator[tuple[int, Batch]]:
    step = 0
    while True:
        for ticket in deal.step(world()[0], step):
            found = [row(abs(ticket) * rows + k) for k in range(rows)]
            ids, lengths = np.stack([i for i, _ in found]), [n for _, n in found]
            lengths = [[] for _ in found] if ticket == EMPTY else lengths
            yield ticket, Batch.from_rows(ids, lengths, [0] * rows)
        step += 1


class Kept:
    """A sink that keeps the metrics of every step."""

    def __init__(self) -> None:
        self.metrics: list[dict[str, float]] = []

    def write(self, stage: str, step: int, metrics: dict[str, float]) -> None:
        self.metrics.append(metrics)

    def flush(self) -> None: ...
    def close(self) -> None: ...


def trained(given: TrainingSettings, ternary: bool = True) -> tuple[Loop, list[dict[str, float]]]:
    torch.manual_seed(0)
    model = build_model(CONFIG)
    model.config.mask_token_id, model.config.diffusion_block = MASK, BLOCK
    wrapped = parallelize(LossModel(to_bitnet(model) if ternary else model), given, CPU)
    torch.manual_seed(1)
    cast, kept, teacher = autocast_for(CPU, "auto"), Kept(), None
    if given.needs_teacher:
        dense = build_model(CONFIG | {"initializer_range": 0.2}).requires_grad_(False)
        teacher = InProcessTeacher(dense, cast)
    loop = Loop("here", wrapped, given.optimizer.build(wrapped), given, CPU, cast,
                teacher=teacher, sinks=[kept], sources=("a",))  # fmt: skip
    loop.run(tickets(Deal(given.gradient_accumulation_steps, world()[1]), given.batch_size))
    return loop, kept.metrics


# ----------------------------------------------------------------------------------- two workers


def on_worker() -> list[dict[str, float]]:
    return trained(settings())[1]


def test_two_workers_do_what_one_does(tmp_path: Path) -> None:
    """Three micro-batches for two workers; views depend on the ticket, not on who draws them."""
    two, _ = ranks.run(on_worker, tmp_path)
    torch.set_num_threads(1)
    _, one = trained(settings())
    assert len(one) == 8
    for here, there in zip(one, two, strict=True):
        for name in ("loss", "dlm_num_masked", *(f"{name}_loss" for name in OBJECTIVES)):
            key = f"train/{name}"
            assert there[key] == pytest.approx(here[key], rel=1e-5), key


def test_counts_and_losses_are_those_of_the_whole_global_batch() -> None:
    """A step's masked tokens are its eligible ones, and losses are means over them."""
    _, (metrics, *_) = trained(settings(max_steps=1))
    rows = [row(number) for number in range(12)]
    batch = Batch.from_rows(np.stack([i for i, _ in rows]), [n for _, n in rows], [0] * 12)
    assert metrics["train/dlm_num_masked"] == eligible(batch).sum()
    torch.manual_seed(0)
    model = LossModel(to_bitnet(build_model(CONFIG)))
    set_strength(model, 0.0)  # as in the first step
    ce = ContinuePretrain()
    _, found = model(batch, [Term("ce", ce, 1.0)])
    expected = float(found["ce/sum"] / ce.count(batch))
    assert metrics["train/continue_pretrain_loss"] == pytest.approx(expected, rel=1e-5)


# -------------------------------------------------------------------------------- joint training


@pytest.fixture(scope="module")
def joint() -> tuple[Loop, list[dict[str, float]]]:
    """A dense model that has learnt both; about ten seconds."""
    torch.set_num_threads(1)
    return trained(
        settings(
            max_steps=250, batch_size=8, gradient_accumulation_steps=1, log_every=10,
            optimizer={"type": "adamw", "lr": 4e-3, "weight_decay": 0.0},
            objectives={"continue_pretrain": {"weight": 1.0}, "dlm": {"block": BLOCK}},
        ),
        ternary=False,
    )  # fmt: skip


def test_both_losses_fall(joint: tuple[Loop, list[dict[str, float]]]) -> None:
    first, last = joint[1][0], joint[1][-1]
    for name in ("continue_pretrain", "dlm"):
        assert last[f"train/{name}_loss"] < 0.3 * first[f"train/{name}_loss"], name


def loss_at(model: LossModel, batch: Batch, masked: Tensor) -> float:
    view = masked_batch(batch, [masked], BLOCK)
    _, metrics = model(view, [Term("dlm", DLM(), 1.0)])
    return float(metrics["dlm/sum"] / DLM().count(view))


@torch.no_grad()
def test_one_masked_token_a_block_costs_what_it_costs_autoregressively(
    joint: tuple[Loop, list[dict[str, float]]],
) -> None:
    """A mask ratio of 1/L per block. The last token of a block has nothing but clean text before
    it and nothing after it; anywhere in the block, what comes after can only help."""
    model = joint[0].model.eval()
    rows = [row(10_000 + number) for number in range(64)]
    batch = Batch.from_rows(np.stack([i for i, _ in rows]), [n for _, n in rows], [0] * 64)
    place = batch.position_ids % BLOCK
    last = eligible(batch) & (place == BLOCK - 1)
    anywhere = eligible(batch) & (place == torch.arange(64)[:, None] % BLOCK)
    for masked, relation in ((last, pytest.approx), (anywhere, None)):
        only = Batch(**{**vars(batch), "labels": torch.where(masked, batch.labels, IGNORED)})
        _, metrics = model(only, [Term("ce", ContinuePretrain(), 1.0)])
        autoregressive = float(metrics["ce/sum"] / masked.sum())
        guessed = loss_at(model, batch, masked)
        if relation is not None:
            assert guessed == pytest.approx(autoregressive, abs=0.1)
        assert guessed < autoregressive + 0.1
    assert loss_at(model, batch, eligible(batch)) > loss_at(model, batch, last) + 0.05


@pytest.mark.parametrize("strategy", [None, "greedy", "iterative", "adaptive"])
def test_both_modes_go_on_counting(
    joint: tuple[Loop, list[dict[str, float]]], strategy: str | None
) -> None:
    model, right = joint[0].model.model.eval(), 0
    sampling = Sampling(temperature=0, max_new_tokens=12)
    for start, step in ((3, 1), (10, 2), (20, 3), (30, 1)):
        ids = [(start + step * k) % 38 + 1 for k in range(24)]
        if strategy is None:
            found = list(tokens(model, ids[:12], sampling, END))
        else:
            how = Diffusion.model_validate({"strategy": strategy})
            found = list(diffuse(model, ids[:12], sampling, how, END))
        right += sum(a == b for a, b in zip(found, ids[12:], strict=False))
    assert right >= 0.8 * 48

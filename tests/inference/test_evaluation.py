"""Held-out losses against plain transformers: each document alone, no packing, no chunks."""

import math

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel

from bitray.export.reference import dequantized
from bitray.inference import evaluate, perplexity
from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.models.losses import LossModel
from bitray.nn import set_strength, strength_of
from bitray.training.loop import autocast_for

CPU = torch.device("cpu")
ROWS = {"a": [[10, 12], [24], [3, 1, 7]], "b": [[5, 5, 5], []]}


def make(model_type: str = "llama") -> PreTrainedModel:
    torch.manual_seed(
        1
    )  # with which no activation lies so near to a border that it is rounded anew
    config = {
        "model_type": model_type, "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.2,
    }  # fmt: skip
    return to_bitnet(build_model(config), "paper")


def rows(domain: str) -> np.ndarray:
    ids = np.random.default_rng(len(domain)).integers(0, 61, (len(ROWS[domain]), 24))
    return ids.astype(np.int32)


def batches(domain: str, size: int) -> list[Batch]:
    ids, lengths = rows(domain), ROWS[domain]
    return [
        Batch.from_rows(
            ids[at : at + size], lengths[at : at + size], [0] * len(ids[at : at + size])
        )
        for at in range(0, len(ids), size)
    ]


def by_document(model: PreTrainedModel, domain: str) -> float:
    """Mean over all tokens that have one before them in their document."""
    total, count = 0.0, 0
    for row, documents in zip(torch.from_numpy(rows(domain)).long(), ROWS[domain], strict=True):
        for part in row[: sum(documents)].split(documents):
            with torch.no_grad():
                logits = model(part[None], use_cache=False).logits[0, :-1].double()
            total += F.cross_entropy(logits, part[1:], reduction="sum").item()
            count += len(part) - 1
    return total / count


@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_losses_are_those_of_each_document_alone(model_type: str, size: int) -> None:
    model = make(model_type)
    set_strength(model, 0.3)
    wrapped = LossModel(model, chunk_tokens=7)
    domains = {name: batches(name, size) for name in ROWS}
    found = evaluate(wrapped, domains, CPU, autocast_for(CPU, "auto"))
    assert model.training and strength_of(model) == pytest.approx(0.3), "it goes on as before"
    set_strength(model, 1.0)
    for name, loss in found.items():
        assert loss == pytest.approx(by_document(model, name), rel=1e-5)


def test_rounding_of_activations_is_all_that_is_lost_to_dequantised_weights() -> None:
    """Plain linear layers of code times scale, activations in floating point: nearly the same."""
    model = make()
    domains = {name: batches(name, 8) for name in ROWS}
    found = evaluate(LossModel(model), domains, CPU, autocast_for(CPU, "auto"))
    for name, loss in found.items():
        plain = by_document(dequantized(model), name)
        assert loss == pytest.approx(plain, rel=2e-2) and loss != plain


def test_perplexity() -> None:
    assert perplexity(0.0) == 1.0
    assert perplexity(math.log(61)) == pytest.approx(61)
    assert perplexity(1e4) == math.inf

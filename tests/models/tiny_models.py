"""Tiny models of every family, and packed batches for them."""

from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from bitray.models.batch import Batch
from bitray.models.loading import build_model

VOCABULARY = 97
CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
}


def make_model(model_type: str = "llama", seed: int = 0, **config: Any) -> PreTrainedModel:
    """Random weights, norms and biases included, so that none of them can be forgotten."""
    torch.manual_seed(seed)
    head_dim = {"head_dim": 32} if model_type == "qwen3" else {}  # heads*head_dim != hidden
    model = build_model({"model_type": model_type, **CONFIG, **head_dim, **config})
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name or name.endswith("bias"):
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def make_batch(lengths: list[list[int]], width: int = 32, seed: int = 0) -> Batch:
    """Rows of random tokens, cut into documents of these lengths."""
    ids = np.random.default_rng(seed).integers(0, VOCABULARY, (len(lengths), width))
    return Batch.from_rows(ids, lengths, [0] * len(lengths))

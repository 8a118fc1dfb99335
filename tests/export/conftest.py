"""What the export tests share: small models of every kind, and a NumPy engine that reads GGUF."""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "scripts"))

from gguf_models import make_model

Made = tuple[PreTrainedModel, PreTrainedTokenizerFast]


@pytest.fixture(scope="session")
def made() -> Callable[[str], Made]:
    """A model and its tokenizer by name, made once; tests that change the model make their own."""
    cache: dict[str, Made] = {}

    def make(name: str) -> Made:
        if name not in cache:
            cache[name] = make_model(name)
        return cache[name]

    return make


@pytest.fixture
def ids() -> list[int]:
    return [int(i) for i in np.random.default_rng(0).integers(2, 400, 24)]

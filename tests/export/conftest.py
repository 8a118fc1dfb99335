"""What the export tests share: small models of every kind, and a NumPy engine that reads GGUF."""

from collections.abc import Callable

import numpy as np
import pytest
from gguf_models import make_model
from transformers import PreTrainedModel, PreTrainedTokenizerFast

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

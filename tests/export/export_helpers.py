"""How the export tests run and compare models."""

import numpy as np
import torch
from transformers import PreTrainedModel


@torch.no_grad()
def logits(model: PreTrainedModel, ids: list[int]) -> np.ndarray:
    """Logits [tokens, vocabulary] of one sequence."""
    return model.eval()(torch.tensor([ids])).logits[0].float().numpy()


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the difference over the RMS of what is expected."""
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


def with_f16_tables(model: PreTrainedModel) -> PreTrainedModel:
    """Embeddings and head rounded as a ternary file has them."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")):
                parameter.copy_(parameter.half().float())
    return model

"""What autoregressive and block-diffusion generation share: how tokens are drawn."""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import PreTrainedModel

from bitray.inference.settings import Sampling
from bitray.settings import UserError


def check_fits(model: PreTrainedModel, ids: list[int], sampling: Sampling) -> None:
    """`UserError` if the model has no positions for prompt and continuation."""
    limit = model.config.max_position_embeddings
    if len(ids) + sampling.max_new_tokens > limit:
        raise UserError(
            f"prompt of {len(ids)} tokens and max_new_tokens={sampling.max_new_tokens} do not fit "
            f"into the model's {limit} positions"
        )


def choose(
    logits: Float[Tensor, "n vocab"], sampling: Sampling, generator: torch.Generator
) -> Int[Tensor, " n"]:
    """A token for each row."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    logits = logits / sampling.temperature
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, logits.shape[-1]))
        logits = torch.full_like(logits, -torch.inf).scatter(-1, kept.indices, kept.values)
    probabilities, order = logits.softmax(-1).sort(descending=True)
    outside = probabilities.cumsum(-1) - probabilities >= sampling.top_p
    probabilities = probabilities.masked_fill(outside, 0.0)
    drawn = torch.multinomial(probabilities, 1, generator=generator)
    return order.gather(-1, drawn)[:, 0]

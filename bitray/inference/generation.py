"""Autoregressive text from a model, with a key-value cache, at strength 1."""

from collections.abc import Iterator

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from bitray.inference.evaluation import fully_quantised
from bitray.inference.settings import Sampling
from bitray.settings import UserError


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling | None = None,
) -> str:
    """The continuation of `prompt`, without the prompt. Ends at the end-of-text token."""
    sampling = sampling or Sampling()
    ids = prompt_ids(tokenizer, prompt)
    new = list(tokens(model, ids, sampling, tokenizer.eos_token_id))
    return str(tokenizer.decode(new, skip_special_tokens=True))


def prompt_ids(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Ids of a prompt; a start token for an empty one."""
    ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    if ids:
        return ids
    start = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
    if start is None:
        raise UserError("prompt: it is empty, and the tokenizer has no token to start from")
    return [start]


def tokens(
    model: PreTrainedModel, ids: list[int], sampling: Sampling, end: int | None
) -> Iterator[int]:
    """New token ids, one at a time."""
    limit = model.config.max_position_embeddings
    if len(ids) + sampling.max_new_tokens > limit:
        raise UserError(
            f"prompt of {len(ids)} tokens and max_new_tokens={sampling.max_new_tokens} do not fit "
            f"into the model's {limit} positions"
        )
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache, inputs = DynamicCache(config=model.config), torch.tensor([ids], device=device)
    with fully_quantised(model), torch.no_grad():
        for _ in range(sampling.max_new_tokens):
            logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits[0, -1]
            token = _choose(logits.float(), sampling, generator)
            if token == end:
                return
            yield token
            inputs = torch.tensor([[token]], device=device)


def _choose(
    logits: Float[Tensor, " vocabulary"], sampling: Sampling, generator: torch.Generator
) -> int:
    if sampling.temperature == 0:
        return int(logits.argmax())
    logits = logits / sampling.temperature
    if sampling.top_k:
        kept = logits.topk(min(sampling.top_k, logits.numel()))
        logits = torch.full_like(logits, -torch.inf).scatter(0, kept.indices, kept.values)
    probabilities, order = logits.softmax(-1).sort(descending=True)
    outside = probabilities.cumsum(0) - probabilities >= sampling.top_p
    probabilities = probabilities.masked_fill(outside, 0.0)
    return int(order[torch.multinomial(probabilities, 1, generator=generator)])

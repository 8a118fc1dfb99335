"""Text from a model, at strength 1; autoregressive here, with a key-value cache."""

from collections.abc import Iterator

import torch
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from bitray.inference.diffusion import diffuse
from bitray.inference.evaluation import fully_quantised
from bitray.inference.sampling import check_fits, choose
from bitray.inference.settings import Diffusion, Sampling
from bitray.models.mask_token import mask_token_id
from bitray.settings import UserError


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    sampling: Sampling | None = None,
    diffusion: Diffusion | None = None,
) -> str:
    """The continuation of `prompt`, without the prompt, up to the end of text; token by token, or
    with `diffusion` in blocks."""
    sampling, end = sampling or Sampling(), tokenizer.eos_token_id
    ids = prompt_ids(tokenizer, prompt)
    if diffusion is None:
        new = tokens(model, ids, sampling, end)
    else:
        new = diffuse(model, ids, sampling, diffusion, end)
    return str(tokenizer.decode(list(new), skip_special_tokens=True))


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
    check_fits(model, ids, sampling)
    mask_token = mask_token_id(model.config)
    device = next(model.parameters()).device
    generator = torch.Generator(device).manual_seed(sampling.seed)
    cache, inputs = DynamicCache(config=model.config), torch.tensor([ids], device=device)
    with fully_quantised(model), torch.no_grad():
        for _ in range(sampling.max_new_tokens):
            logits = model(input_ids=inputs, past_key_values=cache, use_cache=True).logits[0, -1]
            if mask_token is not None:
                logits[mask_token] = -torch.inf  # nothing has taught the causal half not to say it
            token = int(choose(logits[None].float(), sampling, generator))
            if token == end:
                return
            yield token
            inputs = torch.tensor([[token]], device=device)

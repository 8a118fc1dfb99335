"""Text by block diffusion: the tokens of a block are guessed together, in the mask of training."""

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from bitray.inference.evaluation import fully_quantised
from bitray.inference.sampling import check_fits, choose
from bitray.inference.settings import Diffusion, Sampling
from bitray.models.diffusion import CLEAN, Places, attention_mask
from bitray.models.mask_token import known_mask_token


class Reader:
    """Forwards over one document, on top of a cache of its finished blocks."""

    def __init__(self, model: PreTrainedModel, block: int) -> None:
        self.model, self.block = model, block
        self.cache = DynamicCache(config=model.config)
        self.finished = 0

    def __call__(
        self, ids: Int[Tensor, " n"], noisy: bool, last: bool = False
    ) -> Float[Tensor, "said vocab"]:
        """Logits at `ids`, which follow what is finished (`last`: at the last of them only). Clean
        ones are finished thereby; noisy ones, which are one block, leave no trace."""
        count = len(ids)
        positions = torch.arange(self.finished + count, device=ids.device)[None]
        copy = torch.full_like(positions, CLEAN)
        if noisy:
            copy[:, self.finished :] = 0
        keys = Places(torch.zeros_like(positions), positions, copy)
        queries = Places(*(x[:, self.finished :] for x in keys))
        logits = self.model(
            input_ids=ids[None],
            position_ids=queries.position,
            attention_mask=attention_mask(queries, keys, self.block),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=int(last),
        ).logits[0]
        if noisy:
            self.cache.crop(-count)
        else:
            self.finished += count
        return logits.float()


def diffuse(
    model: PreTrainedModel,
    ids: list[int],
    sampling: Sampling,
    diffusion: Diffusion,
    end: int | None,
) -> Iterator[int]:
    """New token ids, a block at a time. `UserError` for a model without a mask token.

    The end of a text is never masked in training, so the causal half alone has learnt it: a text
    ends where a finished block, read causally as it enters the cache, says that it most likely
    does.
    """
    mask_token = known_mask_token(model.config)
    check_fits(model, ids, sampling)
    block = block_of(model, diffusion)
    device = next(model.parameters()).device
    draw = _Draw(
        mask_token, sampling, diffusion, torch.Generator(device).manual_seed(sampling.seed)
    )
    whole, left = len(ids) // block * block, sampling.max_new_tokens
    known = torch.tensor(ids[whole:], dtype=torch.int64, device=device)
    with fully_quantised(model), torch.no_grad():
        reader = Reader(model, block)
        following = torch.zeros(1, model.config.vocab_size, device=device)
        if whole:
            following = reader(torch.tensor(ids[:whole], device=device), noisy=False, last=True)
        while left > 0:
            width = min(block, model.config.max_position_embeddings - reader.finished)
            guess = torch.full((width,), mask_token, device=device)
            guess[: len(known)] = known
            _fill(reader, guess, torch.arange(width, device=device) >= len(known), following, draw)
            before = torch.cat([following, reader(guess, noisy=False)])
            likeliest = before.argmax(-1).tolist()
            for place in range(len(known), min(width, len(known) + left)):
                token = int(guess[place])
                if end in (token, likeliest[place]):
                    return
                yield token
            left -= width - len(known)
            known, following = known[:0], before[-1:]


def block_of(model: PreTrainedModel, diffusion: Diffusion) -> int:
    """Tokens of a block: as asked for, else as in training."""
    return diffusion.block or getattr(model.config, "diffusion_block", None) or 32


class _Draw(NamedTuple):
    """How masked tokens are chosen."""

    mask_token: int
    sampling: Sampling
    diffusion: Diffusion
    generator: torch.Generator


def _fill(
    reader: Reader,
    guess: Int[Tensor, " n"],
    masked: Bool[Tensor, " n"],
    following: Float[Tensor, "1 vocab"],
    draw: _Draw,
) -> None:
    """Fill the masked places of a block, in place. `following` predicts its first token."""
    forwards = 0
    while masked.any():
        logits = torch.cat([following, reader(guess, noisy=True)[:-1]])[masked]
        logits[:, draw.mask_token] = -torch.inf
        tokens = choose(logits, draw.sampling, draw.generator)
        confidence = logits.softmax(-1).gather(1, tokens[:, None])[:, 0]
        kept = _kept(confidence, draw.diffusion, forwards)
        places = masked.nonzero()[kept, 0]
        guess[places] = tokens[kept]
        masked[places] = False
        forwards += 1


def _kept(
    confidence: Float[Tensor, " m"], diffusion: Diffusion, forwards: int
) -> Bool[Tensor, " m"]:
    """Which of the guesses stay: at least the surest."""
    if diffusion.strategy == "greedy":
        return torch.ones_like(confidence, dtype=torch.bool)
    if diffusion.strategy == "adaptive":
        return (confidence >= diffusion.threshold).index_fill(0, confidence.argmax(), True)
    count = math.ceil(len(confidence) / max(diffusion.steps - forwards, 1))
    surest = confidence.topk(count).indices
    return torch.zeros_like(confidence, dtype=torch.bool).index_fill(0, surest, True)

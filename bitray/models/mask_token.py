"""The mask token: which one it is, and how tokenizer and embeddings come by it."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bitray.settings import UserError

if TYPE_CHECKING:  # settings know the token's name, and load without transformers
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MASK = "<|mask|>"
MULTIPLE = 64
"""Embeddings that have to grow get a number of rows that this divides, for matrix units."""


def mask_token_id(config: "PretrainedConfig") -> int | None:
    """The id that a model was given for masked tokens; None: it knows none."""
    return getattr(config, "mask_token_id", None)


def known_mask_token(config: "PretrainedConfig") -> int:
    """The same, and a `UserError` where there is none."""
    number = mask_token_id(config)
    if number is None:
        raise UserError(
            "this model has no mask token, so it knows nothing of block diffusion; train it with "
            "objectives.dlm first"
        )
    return number


def set_mask_token(tokenizer: "PreTrainedTokenizerBase", text: str = MASK) -> int:
    """Make `text` the tokenizer's mask token, adding it if it is not there; its id.

    `UserError` for a token that already means something: an ordinary one, the end of text, padding.
    """
    known = tokenizer.get_vocab().get(text)
    taken = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, tokenizer.unk_token}
    if known is not None and (
        known == 0 or text in taken or text not in tokenizer.get_added_vocab()
    ):
        raise UserError(
            f"model.mask_token: {text!r} (id {known}) already means something to this tokenizer; "
            f"give a reserved token that is not used, or a new one such as {MASK!r}"
        )
    tokenizer.add_special_tokens({"mask_token": text})
    return int(tokenizer.mask_token_id)


def add_mask_token(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", text: str = MASK
) -> None:
    """Give both a mask token, in place. The same again changes nothing."""
    learn_mask_token(model, set_mask_token(tokenizer, text))


def learn_mask_token(model: "PreTrainedModel", number: int) -> None:
    """Make this id the model's mask token, in place. Embeddings grow only if no row is left for it;
    new rows are the mean of the others."""
    rows = model.config.vocab_size
    if number >= rows:
        model.resize_token_embeddings(number + 1, pad_to_multiple_of=MULTIPLE, mean_resizing=False)
        tables = {model.get_input_embeddings().weight, model.get_output_embeddings().weight}
        for table in tables:  # one, if they are tied
            _fill_with_mean(table, rows)
    model.config.mask_token_id = number


@torch.no_grad()
def _fill_with_mean(table: Tensor, known: int) -> None:
    table[known:] = table[:known].mean(0)

"""The forward of a batch: which arguments keep documents apart (DATA, section 4)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitray.models.attention import FLEX, block_mask
from bitray.models.batch import Batch
from bitray.models.diffusion import MaskedBatch
from bitray.models.mask_token import known_mask_token


def packed_inputs(batch: Batch) -> Mapping[str, Any]:
    """Arguments of a Hugging Face model.

    transformers builds the block-diagonal mask from restarting positions only while there is
    neither a 2-D mask nor a cache, and makes a cache unless told otherwise, even in training.
    """
    return {
        "input_ids": batch.input_ids,
        "position_ids": batch.position_ids,
        "attention_mask": None,
        "use_cache": False,
    }


def last_hidden(model: PreTrainedModel, batch: Batch) -> Float[Tensor, "batch length hidden"]:
    """The input of the output head: hidden states after the final norm."""
    inputs = dict(packed_inputs(batch))
    by_blocks = model.config._attn_implementation == FLEX
    if isinstance(batch, MaskedBatch):
        mask_token = known_mask_token(model.config)
        inputs["input_ids"] = batch.input_ids.masked_fill(batch.masked, mask_token)
        inputs["attention_mask"] = None if by_blocks else batch.attention_mask()
    if by_blocks:
        inputs["attention_mask"] = block_mask(batch)
    return model.base_model(**inputs).last_hidden_state

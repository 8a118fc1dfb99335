"""The forward of packed rows: which arguments keep documents apart (DATA, section 4)."""

from collections.abc import Mapping
from typing import Any

from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from bitray.models.batch import Batch


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
    return model.base_model(**packed_inputs(batch)).last_hidden_state

"""Attention by blocks of what is seen, in place of dense masks (`training.attention: flex`).

Flex attention (Dong et al., arXiv 2412.05496) never visits a block of a row that no query sees, of
packed documents most. It has no backward on CPUs, and does not fit every model.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.flex_attention import flex_attention_forward
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from bitray.models.batch import Batch
from bitray.settings import UserError

FLEX = "flex"
"""The name under which transformers knows it."""
_LEAST_WIDTH = 16
"""Of a head, for its kernels."""


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | BlockMask | None,
    **options: Any,
) -> tuple[Tensor, Tensor | None]:
    """What a mask asks for: a `BlockMask` flex attention, any other scaled dot products."""
    if not isinstance(attention_mask, BlockMask):
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    # Under autocast the rotation has left these two in fp32.
    query, key = query.to(value.dtype), key.to(value.dtype)
    return flex_attention_forward(module, query, key, value, attention_mask, **options)


AttentionInterface.register(FLEX, _attention)
AttentionMaskInterface.register(FLEX, sdpa_mask)


def attend_by_blocks(model: PreTrainedModel, device: torch.device) -> None:
    """From now on this model takes block masks. `UserError` where flex attention does not fit."""
    config = model.config
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention"}
    why = (
        "needs GPUs, these workers have CPUs" if device.type != "cuda"
        else f"needs heads of {_LEAST_WIDTH} or wider, these are {width}" if width < _LEAST_WIDTH
        else "knows no dropout, which this model has" if config.attention_dropout
        else f"knows no {min(kinds)}, which this model has" if kinds
        else None
    )  # fmt: skip
    if why is not None:
        raise UserError(f"training.attention: flex {why}; take sdpa")
    config._attn_implementation = FLEX


def block_mask(batch: Batch) -> BlockMask:
    """What each place of a batch sees, as flex attention takes it."""
    sees, (rows, width) = batch.sees(), batch.input_ids.shape
    device = batch.input_ids.device
    return create_block_mask(
        lambda row, head, query, key: sees(row, query, key),
        rows, None, width, width, device,
        _compile=device.type == "cuda",  # else the whole mask would exist on the way
    )  # fmt: skip

"""The start-up self-check: documents packed into one row must not see each other.

Whether they do depends on details of transformers (see `packed`), so it is measured, not assumed.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from bitray.models.batch import IGNORED, Batch
from bitray.models.losses import LossModel, Term
from bitray.settings import UserError

LENGTHS = ((7, 9), (10, 6))
"""Two rows of two documents, cut at different places: batch size 1 would hide some leaks."""
TOLERANCE = 1e-4
"""Relative; masked positions contribute exactly nothing, a leak moves logits by percents."""


def check_documents_isolated(
    model: PreTrainedModel | LossModel, device: torch.device | str
) -> None:
    """Stop where a token of a document moves logits of the next document in its row.

    Runs the forward of training, so every worker calls it if the model is sharded. Leaves random
    state, gradients and training mode as they were. `UserError` on a leak.
    """
    wrapped = model if isinstance(model, LossModel) else LossModel(model)
    vocabulary = wrapped.model.config.vocab_size
    batch, changed = (b.to(device) for b in _rows(vocabulary))
    with _undisturbed(wrapped), torch.no_grad():
        before, after = _logits(wrapped, batch), _logits(wrapped, changed)
    moved = (after - before).abs().amax(-1) / before.abs().max()
    second = _in_second_document(batch)
    if not bool(moved[~second].max() > TOLERANCE):
        raise UserError(
            "document isolation cannot be checked: changing a token moves no output at all; the "
            "weights of this model are constant or not finite"
        )
    leak = moved[second].max().item()
    if leak > TOLERANCE:
        attention = wrapped.model.config._attn_implementation
        raise UserError(
            f"packed documents see each other: a token of one document moves the next one's logits "
            f"by {leak:.1e} of their size; this version of transformers does not keep them apart "
            f"with attention '{attention}', use 'sdpa' and a version that bitray was tested with"
        )


def _rows(vocabulary: int) -> tuple[Batch, Batch]:
    """Rows of two documents, and the same with one token of each first document changed."""
    ids = np.arange(len(LENGTHS) * sum(LENGTHS[0])).reshape(len(LENGTHS), -1) % vocabulary
    other = ids.copy()
    other[:, 2] = (other[:, 2] + vocabulary // 2) % vocabulary
    sources = [0] * len(LENGTHS)
    return tuple(Batch.from_rows(rows, LENGTHS, sources) for rows in (ids, other))  # type: ignore[return-value]


class _Keep:
    """A head objective that keeps the logits of all chunks."""

    needs_teacher = False

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []

    def on_logits(
        self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.chunks.append(logits)
        return logits.new_zeros(()), {}


def _logits(model: LossModel, batch: Batch) -> Float[Tensor, "learnt vocab"]:
    keep = _Keep()
    model(batch, [Term("isolation", keep, 1.0)])
    return torch.cat(keep.chunks)


def _in_second_document(batch: Batch) -> Tensor:
    """Of the positions whose logits are computed, those behind the first document."""
    starts = torch.tensor([first for first, _ in LENGTHS], device=batch.labels.device)
    places = torch.arange(batch.labels.shape[1] - 1, device=batch.labels.device)
    learnt = batch.labels[:, 1:] != IGNORED
    return (places >= starts[:, None])[learnt]


@contextmanager
def _undisturbed(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, put back as it was; a sharded root does not stay gathered."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        if isinstance(model, FSDPModule):
            model.reshard()

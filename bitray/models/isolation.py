"""The start-up self-check: documents packed into one row must not see each other, and a masked
token must not be seen by those who guess it.

Whether they are depends on details of transformers (see `packed`), so it is measured, not assumed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel

from bitray.models.batch import IGNORED, Batch
from bitray.models.diffusion import MaskedBatch, eligible, masked_batch
from bitray.models.losses import LossModel, Term
from bitray.models.mask_token import mask_token_id
from bitray.settings import UserError

LENGTHS = ((7, 9), (10, 6))
"""Two rows of two documents, cut at different places: batch size 1 would hide some leaks."""
CHANGED, BLOCK = 2, 4
"""Column of the token that is changed, and tokens of a block of diffusion."""
TOLERANCE = 1e-4
"""Relative; masked positions contribute exactly nothing, a leak moves logits by percents."""


def check_documents_isolated(
    model: PreTrainedModel | LossModel, device: torch.device | str
) -> None:
    """Stop where a token of a document moves logits of the next document in its row; of a model
    with a mask token also in block diffusion, and where a masked token moves logits of its block.

    Runs the forward of training, so every worker calls it if the model is sharded. Leaves random
    state, gradients and training mode as they were. `UserError` on a leak.
    """
    wrapped = model if isinstance(model, LossModel) else LossModel(model)
    vocabulary = wrapped.model.config.vocab_size
    rows = [batch.to(device) for batch in _rows(vocabulary)]
    moved, second = _moved(wrapped, rows), _in_second_document(rows[0].predicted())
    if not bool(moved[~second].max() > TOLERANCE):
        raise UserError(
            "document isolation cannot be checked: changing a token moves no output at all; the "
            "weights of this model are constant or not finite"
        )
    _refuse(wrapped, moved[second], "packed documents see each other")
    if mask_token_id(wrapped.model.config) is not None:
        noisy = [_noisy(batch) for batch in rows]
        moved, labels = _moved(wrapped, noisy), noisy[0].guessed
        same, later = _blocks_of_first_copy(labels)
        second = _in_second_document(labels)
        _refuse(wrapped, moved[same | second], "block diffusion sees what it is to guess")
        if not bool(moved[later & ~second].max() > TOLERANCE / 100):  # it comes by attention alone
            raise UserError(
                "block diffusion does not see the text before its block: attention "
                f"'{wrapped.model.config._attn_implementation}' ignores the mask, use 'sdpa'"
            )


def _moved(model: LossModel, rows: Sequence[Batch]) -> Float[Tensor, " learnt"]:
    """How far a change between two batches moves the logits of each place that predicts something,
    relative to their size."""
    with _undisturbed(model), torch.no_grad():
        before, after = (_logits(model, batch) for batch in rows)
    return (after - before).abs().amax(-1) / before.abs().max()


def _refuse(model: LossModel, moved: Tensor, what: str) -> None:
    """`UserError` for logits that are moved by what is out of their sight."""
    leak = moved.max().item()
    if leak > TOLERANCE:
        attention = model.model.config._attn_implementation
        raise UserError(
            f"{what}: a token that is out of sight moves logits by {leak:.1e} of their size; "
            f"this version of transformers does not hide it with attention '{attention}', use "
            "'sdpa' and a version that bitray was tested with"
        )


def _rows(vocabulary: int) -> tuple[Batch, Batch]:
    """Rows of two documents, and the same with one token of each first document changed."""
    ids = np.arange(len(LENGTHS) * sum(LENGTHS[0])).reshape(len(LENGTHS), -1) % vocabulary
    other = ids.copy()
    other[:, CHANGED] = (other[:, CHANGED] + vocabulary // 2) % vocabulary
    sources = [0] * len(LENGTHS)
    return tuple(Batch.from_rows(rows, LENGTHS, sources) for rows in (ids, other))  # type: ignore[return-value]


def _noisy(batch: Batch) -> MaskedBatch:
    """Even columns masked in the first copy, odd ones in the second."""
    even = torch.arange(batch.labels.shape[1], device=batch.labels.device) % 2 == 0
    wanted = eligible(batch)
    return masked_batch(batch, [wanted & even, wanted & ~even], BLOCK)


class _Keep:
    """A head objective that keeps the logits of all chunks."""

    needs_teacher = False

    def __init__(self, on_masked: bool) -> None:
        self.on_masked = on_masked
        self.chunks: list[Tensor] = []

    def on_logits(
        self, logits: Tensor, labels: Tensor, teacher_logits: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        self.chunks.append(logits)
        return logits.new_zeros(()), {}


def _logits(model: LossModel, batch: Batch) -> Float[Tensor, "learnt vocab"]:
    keep = _Keep(isinstance(batch, MaskedBatch))
    model(batch, [Term("isolation", keep, 1.0)])
    return torch.cat(keep.chunks)


def _in_second_document(labels: Tensor) -> Tensor:
    """Of the places that predict a label, those behind the first document (in every copy)."""
    starts = torch.tensor([first for first, _ in LENGTHS], device=labels.device)
    places = torch.arange(labels.shape[1], device=labels.device) % sum(LENGTHS[0])
    return (places >= starts[:, None])[labels != IGNORED]


def _blocks_of_first_copy(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Of the places that predict a label, those of the noisy copy in which the token that is
    changed is masked: in its block, and in later ones."""
    width = sum(LENGTHS[0])
    places = torch.arange(labels.shape[1], device=labels.device).expand_as(labels)[
        labels != IGNORED
    ]
    same = places // BLOCK == CHANGED // BLOCK
    return same, (places < width) & ~same


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

"""What a model is trained on: one micro-batch of packed rows as tensors."""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

IGNORED = -100
"""Label of positions that are not learnt: padding, prompts, the first token of every document."""


@dataclass(frozen=True)
class Batch:
    """Packed rows. `labels[i]` is the token *at* i (the shift happens at the head), or -100."""

    input_ids: Int[Tensor, "batch length"]
    labels: Int[Tensor, "batch length"]
    position_ids: Int[Tensor, "batch length"]
    """Restart at 0 with every document; transformers builds the document mask from them."""
    source_id: Int[Tensor, " batch"]
    real: Bool[Tensor, "batch length"]
    """False on padding, which always comes last and is a document of its own."""

    @classmethod
    def from_rows(
        cls,
        input_ids: np.ndarray,
        lengths: Sequence[Sequence[int]],
        source_id: Sequence[int],
        prompts: Sequence[Sequence[int]] | None = None,
    ) -> "Batch":
        """Rows `[batch, length]` with the lengths of their documents; what is left is padding.

        `prompts`: of each document, how many tokens at its beginning are not learnt; None: 0.
        """
        rows, width = input_ids.shape
        positions = np.empty((rows, width), np.int64)
        learnt = np.zeros((rows, width), bool)
        real = np.zeros((rows, width), bool)
        for row, documents in enumerate(lengths):
            start = 0
            unlearnt = [0] * len(documents) if prompts is None else prompts[row]
            for count, prompt in zip(documents, unlearnt, strict=True):
                positions[row, start : start + count] = np.arange(count)
                learnt[row, start + max(prompt, 1) : start + count] = True
                start += count
            positions[row, start:] = np.arange(width - start)
            real[row, :start] = True
        ids = torch.from_numpy(input_ids.astype(np.int64))
        labels = torch.where(torch.from_numpy(learnt), ids, IGNORED)
        sources = torch.as_tensor(list(source_id), dtype=torch.int64)
        return cls(ids, labels, torch.from_numpy(positions), sources, torch.from_numpy(real))

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

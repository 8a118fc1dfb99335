"""What a model is trained on: one micro-batch of packed rows as tensors."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100
"""Label of positions that are not learnt: padding, prompts, the first token of every document."""
Sees = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Whether, by number of the row, a query's place sees a key's; element by element."""


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

    @property
    def documents(self) -> Int[Tensor, "batch length"]:
        """The number, from 1, of each token's document in its row; 0 for padding."""
        return (self.position_ids == 0).cumsum(1) * self.real

    @property
    def clean(self) -> slice | None:
        """Columns that are the rows as they are, attended causally; None: a view has none."""
        return slice(0, self.input_ids.shape[1])

    def predicted(self, masked: bool = False) -> Int[Tensor, "batch length"]:
        """The label that each place predicts, or -100: the shift happens here. With `masked` only
        labels that a view has masked."""
        assert not masked, "this objective needs a view with masked tokens"
        return F.pad(self.labels[:, 1:], (0, 1), value=IGNORED)

    def origin(self, places: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        """Where in the batch that a teacher sees these (flattened) places of a view come from."""
        return places

    def sees(self) -> Sees:
        """Tokens see their own document up to themselves; padding is one of its own."""
        documents = (self.position_ids == 0).cumsum(1)
        return lambda row, query, key: (
            (query >= key) & (documents[row, query] == documents[row, key])
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on another device."""
        return Batch(*(getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)))

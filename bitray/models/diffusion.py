"""Block diffusion (Fast-dLLM v2, arXiv 2509.26328): its attention mask and its view of a batch.

Training and generation share the mask. What is masked, and how it is learnt, is the objective's.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional as F

from bitray.models.batch import IGNORED, Batch, Sees

CLEAN = -1
"""Number of the copy of a row in which nothing is masked."""


class Places(NamedTuple):
    """Where tokens stand, as far as attention has to know."""

    document: Int[Tensor, "*batch n"]
    """Number of the document in its row."""
    position: Int[Tensor, "*batch n"]
    """In the document."""
    copy: Int[Tensor, "*batch n"]
    """Number of the noisy copy, or CLEAN."""


def sees(query: Places, key: Places, block: int) -> Bool[Tensor, "..."]:
    """Whether a query sees a key, element by element; always in its own document. Blocks of `block`
    tokens begin anew with every document.

    A noisy token sees its block in its own copy, both ways, and the clean tokens of earlier blocks;
    a clean one sees the clean tokens up to itself.
    """
    clean = key.copy == CLEAN
    own, other = query.position // block, key.position // block
    noisy = ((query.copy == key.copy) & (own == other)) | (clean & (other < own))
    seen = torch.where(query.copy == CLEAN, clean & (key.position <= query.position), noisy)
    return seen & (query.document == key.document)


def attention_mask(query: Places, key: Places, block: int) -> Bool[Tensor, "batch 1 queries keys"]:
    """True where a query sees a key."""
    queries = Places(*(each[:, None, :, None] for each in query))
    return sees(queries, Places(*(each[:, None, None, :] for each in key)), block)


@dataclass(frozen=True)
class MaskedBatch(Batch):
    """A batch some of whose tokens are to be guessed, laid out as [noisy copies ; clean].

    The copies share one clean half, so two of them cost 3 lengths, not 4. With `block` None there
    is one noisy copy, attended causally, and no clean half. `input_ids` are the true tokens: the
    model that has the mask token puts it where `masked` is. Labels and `real` are those of the
    clean half.
    """

    masked: Bool[Tensor, "batch length"]
    guessed: Int[Tensor, "batch length"]
    """The masked token that each place predicts, or -100."""
    row: int
    """Length of the rows that it was made of."""
    block: int | None

    @property
    def clean(self) -> slice | None:
        """The last columns, if there is a clean half."""
        width = self.input_ids.shape[1]
        return None if self.block is None else slice(width - self.row, width)

    def predicted(self, masked: bool = False) -> Int[Tensor, "batch length"]:
        """The next token in the clean half, or the masked tokens."""
        return self.guessed if masked else super().predicted()

    def origin(self, places: Int[Tensor, " m"]) -> Int[Tensor, " m"]:
        """Every copy of a token comes from the same place of the batch."""
        width = self.input_ids.shape[1]
        return places // width * self.row + places % self.row

    def attention_mask(self) -> Bool[Tensor, "batch 1 length length"] | None:
        """What sees what; None: the causal mask of packed rows. Made when it is needed: the views
        of a whole step are drawn before its first forward."""
        if self.block is None:
            return None
        places = self._places()
        return attention_mask(places, places, self.block)

    def sees(self) -> Sees:
        """As `attention_mask`."""
        if self.block is None:
            return super().sees()
        places, block = self._places(), self.block

        def seen(row: Tensor, query: Tensor, key: Tensor) -> Tensor:
            asks, told = (Places(*(each[row, at] for each in places)) for at in (query, key))
            return sees(asks, told, block)

        return seen

    def _places(self) -> Places:
        number = torch.arange(self.input_ids.shape[1], device=self.input_ids.device) // self.row
        number = torch.where(number == number[-1], CLEAN, number).expand_as(self.position_ids)
        rows = self.position_ids[:, : self.row]
        documents = (rows == 0).cumsum(1).repeat(1, self.position_ids.shape[1] // self.row)
        return Places(documents, self.position_ids, number)


def eligible(batch: Batch) -> Bool[Tensor, "batch length"]:
    """Tokens that may be masked: those that are learnt, less the end of every document."""
    last = F.pad(batch.position_ids[:, 1:] == 0, (0, 1), value=True)
    return (batch.labels != IGNORED) & ~last


def masked_batch(
    batch: Batch, copies: Sequence[Bool[Tensor, "batch length"]], block: int | None
) -> MaskedBatch:
    """One noisy copy for each mask of tokens to be guessed, of which no token may be in two.

    Logits at i-1 predict token i. The first token of a block is predicted by the *clean* copy of
    the token before it: so it is in generation, where that block is finished.
    """
    first = torch.zeros_like(batch.real) if block is None else batch.position_ids % block == 0
    guessed = [_guessed(batch, mask & ~first) for mask in copies]
    masked, extra = list(copies), []
    if block is not None:
        guessed.append(_guessed(batch, torch.stack(masked).any(0) & first))
        masked.append(torch.zeros_like(batch.real))
        extra = [(batch.labels, batch.real)]
    unlearnt = (torch.full_like(batch.labels, IGNORED), torch.zeros_like(batch.real))
    labels, real = zip(*[unlearnt] * len(copies), *extra, strict=True)
    return MaskedBatch(
        input_ids=batch.input_ids.repeat(1, len(masked)),
        labels=torch.cat(labels, 1),
        position_ids=batch.position_ids.repeat(1, len(masked)),
        source_id=batch.source_id,
        real=torch.cat(real, 1),
        masked=torch.cat(masked, 1),
        guessed=torch.cat(guessed, 1),
        row=batch.labels.shape[1],
        block=block,
    )


def _guessed(batch: Batch, masked: Bool[Tensor, "batch length"]) -> Int[Tensor, "batch length"]:
    labels = torch.where(masked, batch.input_ids, IGNORED)
    return F.pad(labels[:, 1:], (0, 1), value=IGNORED)

"""Block diffusion: masked tokens of a block guessed together (Fast-dLLM v2, arXiv 2509.26328)."""

from typing import Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import nll_loss

from bitray.models.batch import IGNORED, Batch
from bitray.models.diffusion import eligible, masked_batch
from bitray.models.logits import log_softmax
from bitray.objectives.base import HeadObjective, Sums, Weight


class DLM(HeadObjective):
    """Cross-entropy of masked tokens, in nats.

    Of every block a share t ~ U(0, 1) of the tokens is masked, each by itself; a complementary copy
    masks the others, so that every token is learnt once. First and last tokens of documents,
    prompts and padding are never masked.
    """

    on_masked = True

    weight: Weight = 1.0
    mode: Literal["block", "simple"] = "block"
    """`simple`, for comparison: tokens masked with `mask_prob` anywhere in the row, and attention
    causal as ever; no clean half, so cross-entropy then costs a forward of its own."""
    block: int = Field(default=32, ge=1)
    """Tokens of a block; generation uses the same."""
    complementary: bool = True
    mask_prob: float = Field(default=0.15, gt=0, le=1)
    """Of `simple`."""

    @property
    def lengths(self) -> int:
        """Noisy copies, and the clean half of blocks."""
        return 1 if self.mode == "simple" else 3 if self.complementary else 2

    def view(self, batch: Batch, generator: torch.Generator) -> Batch:
        """Noisy copies and the clean half; the same tokens masked for the same generator."""
        wanted = eligible(batch)
        draw = _uniform(batch, generator)
        if self.mode == "simple":
            return masked_batch(batch, [wanted & (draw < self.mask_prob)], None)
        masked = wanted & (draw < self._ratio(batch, generator))
        copies = [masked, wanted & ~masked] if self.complementary else [masked]
        return masked_batch(batch, copies, self.block)

    def _ratio(self, batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch length"]:
        """One draw for each block: every token has that of the first one."""
        columns = torch.arange(batch.labels.shape[1], device=batch.labels.device)
        return _uniform(batch, generator).gather(1, columns - batch.position_ids % self.block)

    def on_logits(
        self,
        logits: Float[Tensor, "n vocab"],
        labels: Int[Tensor, " n"],
        teacher_logits: Float[Tensor, "n vocab"] | None,
    ) -> tuple[Float[Tensor, ""], Sums]:
        """Sum over the masked tokens."""
        logp = log_softmax(logits, 1.0)
        return nll_loss(logp, labels, ignore_index=IGNORED, reduction="sum"), {}


def _uniform(batch: Batch, generator: torch.Generator) -> Float[Tensor, "batch length"]:
    return torch.rand(batch.labels.shape, generator=generator, device=batch.labels.device)

"""Distillation of a teacher's next-token distribution (Hinton et al., arXiv 1503.02531)."""

import math

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from bitray.models.batch import IGNORED
from bitray.models.logits import log_softmax
from bitray.objectives.base import HeadObjective, Sums, Weight


def kl_divergence(target: Float[Tensor, "n k"], logp: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """KL(target || logp) per row, both given as log-probabilities, in nats.

    Differences are taken before they are weighted: of nearly equal distributions the difference
    of cross-entropy and entropy would leave rounding errors only.
    """
    # the sign in front saves the backward pass a negation of size [n, k]
    return -(target.exp() * (logp - target)).sum(-1)


def with_rest(logp: Float[Tensor, "n vocab"], ids: Int[Tensor, "n k"]) -> Float[Tensor, "n k+1"]:
    """Log-probabilities of `ids` and, in the last place, of everything else together."""
    rest = logp.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([logp.gather(-1, ids), rest], -1)


class LogitsDistill(HeadObjective):
    """`T^2 * KL(softmax(z_t / T) || softmax(z_s / T))` per token, in nats.

    The factor keeps the gradient's size about independent of T.
    """

    needs_teacher = True

    weight: Weight = 1.0
    temperature: float = Field(default=2.0, gt=0, allow_inf_nan=False)
    top_k: int | None = Field(default=None, ge=1)
    """Compare only the teacher's k likeliest tokens and one bucket for all others."""

    def on_logits(
        self,
        logits: Float[Tensor, "n vocab"],
        labels: Int[Tensor, " n"],
        teacher_logits: Float[Tensor, "n vocab"] | None,
    ) -> tuple[Float[Tensor, ""], Sums]:
        """Sum over the tokens that have a label; exactly 0 for identical logits."""
        assert teacher_logits is not None
        logp = log_softmax(logits, self.temperature)
        with torch.no_grad():
            target = log_softmax(teacher_logits, self.temperature)
            ids = self._compared(target)
            target = target if ids is None else with_rest(target, ids)
        if ids is not None:
            logp = with_rest(logp, ids)
        divergence = kl_divergence(target, logp) * (labels != IGNORED)
        return self.temperature**2 * divergence.sum(), {}

    def _compared(self, target: Float[Tensor, "n vocab"]) -> Int[Tensor, "n k"] | None:
        """Ids that are compared one by one; None for all."""
        if self.top_k is None or self.top_k >= target.shape[-1]:
            return None
        return target.topk(self.top_k, dim=-1).indices

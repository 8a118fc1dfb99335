"""Distillation of a teacher's next-token distribution (Hinton et al., arXiv 1503.02531)."""

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from bitray.models.batch import IGNORED
from bitray.models.logits import log_softmax
from bitray.models.sparse import TopK, with_rest
from bitray.objectives.base import HeadObjective, Sums, Weight


def kl_divergence(target: Float[Tensor, "n k"], logp: Float[Tensor, "n k"]) -> Float[Tensor, " n"]:
    """KL(target || logp) per row, both given as log-probabilities, in nats.

    Differences are taken before they are weighted: of nearly equal distributions the difference
    of cross-entropy and entropy would leave rounding errors only.
    """
    # the sign in front saves the backward pass a negation of size [n, k]
    return -(target.exp() * (logp - target)).sum(-1)


class LogitsDistill(HeadObjective):
    """`T^2 * KL(softmax(z_t / T) || softmax(z_s / T))` per token, in nats.

    The factor keeps the gradient's size about independent of T. Of a teacher its likeliest tokens
    are enough, which is all that a remote one sends.
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
        teacher_logits: Float[Tensor, "n vocab"] | TopK | None,
    ) -> tuple[Float[Tensor, ""], Sums]:
        """Sum over the tokens that have a label; exactly 0 for identical logits."""
        assert teacher_logits is not None
        logp = log_softmax(logits, self.temperature)
        with torch.no_grad():
            target, ids = self._target(teacher_logits)
        if ids is not None:
            # no rest of a teacher that tells its whole vocabulary, if the student's is larger
            logp = with_rest(logp, ids)[:, : target.shape[-1]]
        divergence = kl_divergence(target, logp) * (labels != IGNORED)
        return self.temperature**2 * divergence.sum(), {}

    def _target(
        self, teacher: Float[Tensor, "n vocab"] | TopK
    ) -> tuple[Float[Tensor, "n kept"], Int[Tensor, "n k"] | None]:
        """The teacher's log-probabilities, and the ids that are compared one by one; None: all."""
        if isinstance(teacher, TopK):
            assert teacher.temperature == self.temperature, "the teacher was asked at another T"
            return teacher.target(self.top_k)
        target = log_softmax(teacher, self.temperature)
        if self.top_k is None or self.top_k >= target.shape[-1]:
            return target, None
        ids = target.topk(self.top_k, dim=-1).indices
        return with_rest(target, ids), ids

"""Next-token cross-entropy."""

from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import nll_loss

from bitray.models.batch import IGNORED
from bitray.models.logits import log_softmax
from bitray.objectives.base import HeadObjective, Sums, Weight


class ContinuePretrain(HeadObjective):
    """Cross-entropy with the next token, `(1-e) * -log p(y) + e * mean_v -log p(v)`.

    Reports `nll`, the part without smoothing: perplexity is exp of its mean, whatever `e` is.
    Label smoothing: Szegedy et al., arXiv 1512.00567, section 7.
    """

    weight: Weight = 1.0
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)

    def on_logits(
        self,
        logits: Float[Tensor, "n vocab"],
        labels: Int[Tensor, " n"],
        teacher_logits: Float[Tensor, "n vocab"] | None,
    ) -> tuple[Float[Tensor, ""], Sums]:
        """Sum of the cross-entropy in nats over the tokens that have a label."""
        logp = log_softmax(logits, 1.0)
        nll = nll_loss(logp, labels, ignore_index=IGNORED, reduction="sum")
        loss, reported = nll, {"nll": nll.detach()}
        if self.label_smoothing > 0:
            uniform = -(logp.mean(-1) * (labels != IGNORED)).sum()
            loss = (1 - self.label_smoothing) * nll + self.label_smoothing * uniform
        return loss, reported

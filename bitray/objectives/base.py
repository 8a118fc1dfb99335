"""What an objective is: frozen settings that are also the behaviour. One file per objective.

An objective returns *sums* over tokens; whoever calls it divides by counts taken over the whole
global batch, so that a loss does not depend on how the batch was cut up.
"""

from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from bitray.models.batch import IGNORED, Batch
from bitray.settings import Settings

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Weight in the sum of objectives; 0 switches an objective off, its teacher included."""

Sums = dict[str, Tensor]
"""Name -> detached scalar; divided by the objective's count it is a mean over tokens."""


class Objective(Settings):
    """Settings and behaviour of one term of the loss."""

    kind: ClassVar[Literal["head", "layer"]]
    """`head`: compares logits. `layer`: compares the outputs of decoder layers."""
    needs_teacher: ClassVar[bool] = False
    takes_top_k: ClassVar[bool] = False
    """Whether a teacher's likeliest tokens are enough, which is all that a remote one sends."""

    weight: Weight = 0.0

    def view(self, batch: Batch, generator: torch.Generator) -> Batch:
        """What the student sees. Objectives that return `batch` itself share one forward."""
        return batch

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        """Number of terms in the sum over this view, a function of the view alone."""
        raise NotImplementedError


class HeadObjective(Objective):
    """An objective on logits. The caller has done the shift and computes logits in chunks."""

    kind = "head"

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        """Labels that some position predicts: all but the first column and the ignored ones."""
        return (batch.labels[:, 1:] != IGNORED).sum()

    def on_logits(
        self,
        logits: Float[Tensor, "n vocab"],
        labels: Int[Tensor, " n"],
        teacher_logits: Float[Tensor, "n vocab"] | None,
    ) -> tuple[Float[Tensor, ""], Sums]:
        """Sum of the loss over the tokens whose label is not -100, and sums to report.

        Row i of both kinds of logits predicts `labels[i]`. The sum is differentiable in `logits`.
        """
        raise NotImplementedError


class LayerObjective(Objective):
    """An objective on hidden states, called for every decoder layer with chunks of real tokens."""

    kind = "layer"

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        """Real tokens: padding is never compared."""
        return batch.real.sum()

    def on_layer(
        self,
        index: int,
        num_layers: int,
        student: Float[Tensor, "n hidden"],
        teacher: Float[Tensor, "n hidden"],
        teacher_head: Float[Tensor, "vocab hidden"],
    ) -> tuple[Float[Tensor, ""], Sums]:
        """This layer's share of the sum over tokens (all add up to it), and sums to report."""
        raise NotImplementedError

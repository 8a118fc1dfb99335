"""What an objective is: frozen settings that are also the behaviour. One file per objective.

An objective returns *sums* over tokens; whoever calls it divides by counts taken over the whole
global batch, so that a loss does not depend on how the batch was cut up.
"""

from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from bitray.models.batch import IGNORED, Batch
from bitray.nn.moe import Routing
from bitray.settings import Settings

Weight = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Weight in the sum of objectives; 0 switches an objective off, its teacher included."""

Sums = dict[str, Tensor]
"""Name -> detached scalar; divided by the objective's count it is a mean over tokens."""

Gradients = list[Tensor | None]


class Objective(Settings):
    """Settings and behaviour of one term of the loss."""

    kind: ClassVar[Literal["head", "layer", "attention", "router"]]
    """`head`: compares logits. `layer`: compares the outputs of decoder layers. `attention`: those
    of one layer's query, key and value projections. `router`: looks at where experts' routers send
    tokens."""
    needs_teacher: ClassVar[bool] = False
    on_masked: ClassVar[bool] = False
    """Whether it looks at the tokens that a view masks, and not at the rows as they are."""
    view_of: ClassVar[str | None] = None
    """Name of the objective whose view it looks at; None: its own."""

    weight: Weight = 0.0

    @property
    def factor(self) -> float | None:
        """What multiplies the weight; None: measured at the start, so that the gradient is
        `grad_ratio` of that of continue_pretrain."""
        return 1.0

    @property
    def lengths(self) -> int:
        """How many times as wide as the rows its view is."""
        return 1

    def view(self, batch: Batch, generator: torch.Generator) -> Batch:
        """What the student sees. Objectives that return `batch` itself share one forward, that of a
        view with a `clean` half where there is one."""
        return batch

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        """Number of terms in the sum over this view, a function of the view alone."""
        raise NotImplementedError


class HeadObjective(Objective):
    """An objective on logits. The caller has done the shift and computes logits in chunks."""

    kind = "head"

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        """Labels that some position predicts: all but the first column and the ignored ones; or
        the masked tokens."""
        return (batch.predicted(self.on_masked) != IGNORED).sum()

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


class AttentionObjective(Objective):
    """An objective on what the query, key and value projections of one layer put out."""

    kind = "attention"
    needs_teacher = True

    grad_ratio: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    """The gradient that a `factor` to be measured aims at, relative to continue_pretrain's."""
    layer: int = -1
    """Which decoder layer of student and of teacher; negative ones count from the last."""

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        """Real tokens: padding is never compared."""
        return batch.real.sum()

    def on_projections(
        self,
        documents: Int[Tensor, "batch length"],
        student: Sequence[Float[Tensor, "batch length _"]],
        teacher: Sequence[Float[Tensor, "batch length _"]],
        key_heads: int,
        wanted: Sequence[bool],
    ) -> tuple[Float[Tensor, ""], Gradients]:
        """Sum over tokens, detached, and its gradients in those of the student that are wanted.

        `documents` number the tokens' documents in their row; 0 is padding.
        """
        raise NotImplementedError


class RouterObjective(Objective):
    """An objective on what the routers of all layers of experts decide."""

    kind = "router"

    def count(self, batch: Batch) -> Int[Tensor, ""]:
        """Real tokens: it does not matter where padding goes."""
        return batch.real.sum()

    def on_routers(
        self, routings: Sequence[Routing], real: Bool[Tensor, " tokens"]
    ) -> tuple[Float[Tensor, ""], Sums]:
        """Sum over the real tokens, differentiable in the routings, and sums to report."""
        raise NotImplementedError

"""Layer-wise distillation of hidden states (Stage 1.9; OneBit, arXiv 2402.11295)."""

import math
from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import field_validator
from torch import Tensor
from torch.nn.functional import log_softmax, normalize

from bitray.objectives.base import LayerObjective, Sums, Weight
from bitray.objectives.logits_distill import kl_divergence
from bitray.settings import UserError

PerToken = Float[Tensor, " n"]
States = Float[Tensor, "n hidden"]


def mse_normalized(student: States, teacher: States) -> PerToken:
    """`|s/|s| - t/|t||^2`, summed over the hidden axis: 2 (1 - cos), without its cancellation.

    A mean over the hidden axis would make 0.0019 look excellent while the cosine is 0.46.
    """
    return (normalize(student, dim=-1) - normalize(teacher, dim=-1)).square().sum(-1)


def cosine(student: States, teacher: States) -> PerToken:
    """`1 - cos(s, t)`."""
    return mse_normalized(student, teacher) / 2


def mse(student: States, teacher: States) -> PerToken:
    """Mean over the hidden axis of the squared difference."""
    return (student - teacher).square().mean(-1)


def inner_product(student: States, teacher: States) -> PerToken:
    """`(<s, t> / <t, t> - 1)^2`: the student's component along the teacher has the right length.

    The bare product has no minimum: longer and longer states would lower it for ever.
    """
    length = teacher.square().sum(-1).clamp_min(torch.finfo(teacher.dtype).tiny)
    return ((student * teacher).sum(-1) / length - 1).square()


def kl(student: States, teacher: States, head: Float[Tensor, "vocab hidden"]) -> PerToken:
    """KL of the softmax through the teacher's frozen output head. Makes logits for all tokens that
    it is given: the caller gives them in chunks."""
    dtype = head.dtype
    with torch.no_grad():
        target = log_softmax(teacher.to(dtype) @ head.T, -1, dtype=torch.float32)
    return kl_divergence(target, log_softmax(student.to(dtype) @ head.T, -1, dtype=torch.float32))


LOSSES: dict[str, Callable[[States, States], PerToken]] = {
    "cosine": cosine,
    "mse_normalized": mse_normalized,
    "mse": mse,
    "inner_product": inner_product,
}


class HiddenDistill(LayerObjective):
    """Distance between the outputs of the student's and the teacher's decoder layers.

    Reports `cosine`, whose mean over tokens is the mean cosine similarity over the layers.
    """

    needs_teacher = True

    weight: Weight = 1.0
    loss_type: Literal["cosine", "mse_normalized", "mse", "inner_product", "kl"] = "mse_normalized"
    layer_weights: Literal["uniform", "progressive", "exponential"] | list[float] = "progressive"
    """`progressive`: i+1, `exponential`: 2^i, or one number per layer; made to sum to 1."""

    @field_validator("layer_weights")
    @classmethod
    def _are_weights(cls, given: str | list[float]) -> str | list[float]:
        if isinstance(given, list) and not (
            all(math.isfinite(w) and w >= 0 for w in given) and sum(given) > 0
        ):
            raise ValueError("layer weights are numbers >= 0 of which at least one is above 0")
        return given

    def shares(self, num_layers: int) -> list[float]:
        """Each layer's share of the loss, summing to 1; a list of the wrong length is refused."""
        match self.layer_weights:
            case "uniform":
                raw = [1.0] * num_layers
            case "progressive":
                raw = [i + 1.0 for i in range(num_layers)]
            case "exponential":
                raw = [2.0 ** (i + 1 - num_layers) for i in range(num_layers)]
            case list(raw) if len(raw) == num_layers:
                pass
            case given:
                raise UserError(
                    f"hidden_distill.layer_weights has {len(given)} numbers but the model has "
                    f"{num_layers} decoder layers; give one number per layer"
                )
        total = sum(raw)
        return [weight / total for weight in raw]

    def on_layer(
        self,
        index: int,
        num_layers: int,
        student: States,
        teacher: States,
        teacher_head: Float[Tensor, "vocab hidden"],
    ) -> tuple[Float[Tensor, ""], Sums]:
        """Sum over tokens of this layer's distance, times its share; computed in fp32."""
        share = self.shares(num_layers)[index]
        student, teacher = student.float(), teacher.detach().float()
        if self.loss_type == "kl":
            loss = kl(student, teacher, teacher_head.detach())
        else:
            loss = LOSSES[self.loss_type](student, teacher)
        with torch.no_grad():
            distance = {"cosine": loss, "mse_normalized": loss / 2}.get(self.loss_type)
            if distance is None:
                distance = cosine(student, teacher)
            similarity = (1 - distance).sum() / num_layers
        return share * loss.sum(), {"cosine": similarity}

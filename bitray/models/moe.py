"""Dense models with experts in place of their MLPs, experimental.

Every expert begins as a copy of the MLP it replaces ("sparse upcycling", arXiv 2212.05055), so that
the model computes what the dense one did. Slices of an MLP would not: a SubLN, a ternary scale and
the range of int8 activations are taken over its whole width.
"""

import copy
from collections.abc import Iterator
from typing import Any, Literal

import torch
from jaxtyping import Int
from pydantic import Field, model_validator
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from bitray.models.families import decoder_layers
from bitray.nn.moe import IdentityRouter, MixtureOfExperts, TopKRouter
from bitray.settings import Settings, UserError


class Experts(Settings):
    """How many experts a layer has, and how tokens find them. Kept in the model's config."""

    num_experts: int = Field(default=8, ge=2)
    top_k: int = Field(default=2, ge=1)
    router: Literal["top_k", "identity"] = "top_k"

    @model_validator(mode="after")
    def _are_enough(self) -> "Experts":
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k} of num_experts={self.num_experts} cannot be")
        return self


def experts_of(config: PretrainedConfig) -> Experts | None:
    """The experts that a config speaks of; None for a dense model."""
    ours: dict[str, Any] = getattr(config, "bitray", None) or {}
    return Experts(**ours["moe"]) if "moe" in ours else None


def mixtures(model: nn.Module) -> Iterator[MixtureOfExperts]:
    """Every layer of experts, in order."""
    return (module for module in model.modules() if isinstance(module, MixtureOfExperts))


def create_fake_moe(
    model: PreTrainedModel,
    num_experts: int = 8,
    top_k: int = 2,
    router: Literal["top_k", "identity"] = "top_k",
) -> PreTrainedModel:
    """A copy of `model`, dense or ternary, whose MLPs are `num_experts` copies of themselves each.

    Its logits are the model's whatever the routers do, since the weights of a token sum to 1; once
    trained it is a mixture of experts like any other. `UserError` for one that is.
    """
    if experts_of(model.config):
        raise UserError("create_fake_moe: the model is a mixture of experts already")
    try:
        experts = Experts(num_experts=num_experts, top_k=top_k, router=router)
    except ValueError as error:
        raise UserError(f"create_fake_moe: {error}") from None
    return add_experts(copy.deepcopy(model), experts)


def add_experts(model: PreTrainedModel, experts: Experts) -> PreTrainedModel:
    """Replace every MLP, in place."""
    for layer in decoder_layers(model):
        mlp = layer.get_submodule("mlp")
        device = next(mlp.parameters()).device
        if experts.router == "identity":
            router: TopKRouter | IdentityRouter = IdentityRouter(experts.num_experts, experts.top_k)
        else:
            width = model.config.hidden_size
            router = TopKRouter(width, experts.num_experts, experts.top_k).to(device)
        copies = [mlp, *(copy.deepcopy(mlp) for _ in range(experts.num_experts - 1))]
        layer.set_submodule("mlp", MixtureOfExperts(copies, router))
    ours = getattr(model.config, "bitray", None) or {}
    model.config.bitray = {**ours, "moe": experts.model_dump()}
    return model


@torch.no_grad()
def verify_moe_matches_dense(
    moe: PreTrainedModel,
    dense: PreTrainedModel,
    input_ids: Int[Tensor, "batch length"],
    tolerance: float = 1e-3,
) -> tuple[bool, float]:
    """Whether both give the same logits, and the RMS of the difference over that of the dense ones.

    The last bit of a sum of weights may push an int8 activation over to its neighbour, which is
    what the tolerance is for; experts that are not copies are off by 0.1 and more.
    """
    found, expected = (each.eval()(input_ids=input_ids).logits.float() for each in (moe, dense))
    error = ((found - expected).square().mean() / expected.square().mean()).sqrt().item()
    return error <= tolerance, error

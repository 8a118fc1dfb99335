"""Mixture of experts, experimental: routers, the layer, and the losses that balance routers."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Float32, Int
from torch import Tensor, nn
from torch.nn import functional as F


class Routing(NamedTuple):
    """Where tokens go. The weights of a token sum to 1."""

    experts: Int[Tensor, "tokens k"]
    weights: Float32[Tensor, "tokens k"]
    logits: Float32[Tensor, "tokens experts"]


class TopKRouter(nn.Module):
    """The k likeliest experts of a softmax, their probabilities made to sum to 1 (Mixtral,
    arXiv 2401.04088). In fp32 also under autocast: rounding would choose other experts."""

    def __init__(self, width: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        nn.init.normal_(self.weight, std=0.02)

    def forward(self, x: Float[Tensor, "tokens width"]) -> Routing:
        """Differentiable in x and the router's weight through the weights of the experts."""
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.float(), self.weight.float())
        weights, experts = logits.softmax(-1).topk(self.top_k, dim=-1)
        return Routing(experts, weights / weights.sum(-1, keepdim=True), logits)

    def extra_repr(self) -> str:
        return f"experts={self.num_experts}, top_k={self.top_k}"


class IdentityRouter(nn.Module):
    """Every token to the first k experts in equal parts: nothing to learn, for checking a layer."""

    def __init__(self, num_experts: int, top_k: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k

    def forward(self, x: Float[Tensor, "tokens width"]) -> Routing:
        """The same whatever x is."""
        experts = torch.arange(self.top_k, device=x.device).expand(len(x), -1)
        weights = torch.full((len(x), self.top_k), 1 / self.top_k, device=x.device)
        return Routing(experts, weights, torch.zeros(len(x), self.num_experts, device=x.device))


class MixtureOfExperts(nn.Module):
    """`y = sum_i w_i expert_i(x)` over the experts that the router chooses for a token.

    Every expert runs in every forward, if need be on no token at all, so that under FSDP all
    workers reduce the same gradients.
    """

    def __init__(self, experts: Sequence[nn.Module], router: TopKRouter | IdentityRouter) -> None:
        super().__init__()
        self.experts = nn.ModuleList(experts)
        self.router = router

    def forward(self, x: Float[Tensor, "*batch width"]) -> Float[Tensor, "*batch width"]:
        """Each token through its experts; differentiable in x, experts and router."""
        tokens = x.reshape(-1, x.shape[-1])
        routing: Routing = self.router(tokens)
        total = torch.zeros_like(tokens)
        for number, expert in enumerate(self.experts):
            token, place = torch.where(routing.experts == number)
            part = expert(tokens[token]) * routing.weights[token, place, None]
            total = total.index_add(0, token, part.to(total.dtype))
        return total.view_as(x)


def load_balancing_loss(
    routing: Routing, real: Bool[Tensor, " tokens"] | None = None
) -> Float32[Tensor, ""]:
    """`E * sum_e f_e P_e / k` (Switch, arXiv 2101.03961, eq. 4, for k choices): 1 when balanced.

    f_e is the share of tokens that have e among their k, P_e the mean probability of e; over the
    `real` tokens alone. Differentiable through P. 0 where there is no token.
    """
    count, k = routing.logits.shape[-1], routing.experts.shape[-1]
    chosen = F.one_hot(routing.experts, count).sum(1).float()
    likely = routing.logits.softmax(-1)
    kept = torch.ones(len(chosen), device=chosen.device) if real is None else real.float()
    tokens = kept.sum().clamp_min(1)
    return count / k * ((kept @ chosen) / tokens * ((kept @ likely) / tokens)).sum()


def z_loss(routing: Routing, real: Bool[Tensor, " tokens"] | None = None) -> Float32[Tensor, ""]:
    """Mean of `logsumexp(logits)^2`, which keeps the router's logits small (ST-MoE,
    arXiv 2202.08906, eq. 5)."""
    squares = routing.logits.logsumexp(-1).square()
    kept = torch.ones_like(squares) if real is None else real.float()
    return (squares * kept).sum() / kept.sum().clamp_min(1)

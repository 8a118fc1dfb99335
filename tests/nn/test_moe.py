"""Routers, layer and losses of experts against their definitions, a token at a time."""

import math

import pytest
import torch
from torch import nn

from bitray.nn import BitLinear, IdentityRouter, MixtureOfExperts, TopKRouter
from bitray.nn.moe import Routing, load_balancing_loss, z_loss


def layer(num_experts: int = 5, top_k: int = 2, kind: type = nn.Linear) -> MixtureOfExperts:
    torch.manual_seed(0)
    router = TopKRouter(8, num_experts, top_k)
    nn.init.normal_(router.weight)
    return MixtureOfExperts([kind(8, 8) for _ in range(num_experts)], router)


@pytest.mark.parametrize("top_k", [1, 2, 5])
def test_weights_are_the_likeliest_experts_and_sum_to_1(top_k: int) -> None:
    torch.manual_seed(1)
    router = TopKRouter(8, 5, top_k)
    x = torch.randn(30, 8)
    routing = router(x)
    assert torch.allclose(routing.weights.sum(-1), torch.ones(30))
    for token, (experts, weights) in enumerate(zip(routing.experts, routing.weights, strict=True)):
        scores = [math.exp(float(row @ x[token])) for row in router.weight.detach()]
        best = sorted(range(5), key=lambda e: -scores[e])[:top_k]
        assert experts.tolist() == best
        expected = [scores[e] / sum(scores[b] for b in best) for e in best]
        assert weights.tolist() == pytest.approx(expected, rel=1e-5)


def test_the_identity_router_takes_the_first_in_equal_parts() -> None:
    routing = IdentityRouter(6, 4)(torch.randn(3, 8))
    assert routing.experts.tolist() == [[0, 1, 2, 3]] * 3
    assert routing.weights.tolist() == [[0.25] * 4] * 3


@pytest.mark.parametrize("kind", [nn.Linear, BitLinear])
def test_a_token_goes_through_its_own_experts(kind: type) -> None:
    mixture, x = layer(kind=kind), torch.randn(2, 7, 8)
    found = mixture(x)
    routing = mixture.router(x.reshape(-1, 8))
    for token in range(14):
        vector = x.reshape(-1, 8)[token]
        expected = sum(
            weight * mixture.experts[int(expert)](vector[None])[0]
            for expert, weight in zip(routing.experts[token], routing.weights[token], strict=True)
        )
        assert torch.allclose(found.reshape(-1, 8)[token], expected, atol=1e-6)


def test_an_expert_that_nobody_chose_has_gradients_of_zero() -> None:
    """None would be another reduction under FSDP than that of a worker where it was chosen."""
    mixture = layer(num_experts=5, top_k=1, kind=BitLinear)
    mixture(torch.randn(1, 1, 8)).sum().backward()
    norms = [float(expert.weight.grad.norm()) for expert in mixture.experts]
    assert sum(norm > 0 for norm in norms) == 1 and all(math.isfinite(norm) for norm in norms)


def test_the_router_learns_through_the_weights() -> None:
    mixture = layer()
    mixture(torch.randn(4, 3, 8)).square().sum().backward()
    assert mixture.router.weight.grad.norm() > 0


def test_autocast_leaves_the_choice_alone() -> None:
    router, x = layer().router, torch.randn(200, 8)
    with torch.autocast("cpu", torch.bfloat16):
        cast = router(x)
    assert torch.equal(cast.logits, router(x).logits) and cast.weights.dtype == torch.float32


def routing(logits: torch.Tensor, top_k: int) -> Routing:
    weights, experts = logits.softmax(-1).topk(top_k)
    return Routing(experts, weights / weights.sum(-1, keepdim=True), logits)


def test_the_balancing_loss_by_its_definition() -> None:
    torch.manual_seed(2)
    tokens, count, k = 11, 6, 2
    logits, real = torch.randn(tokens, count), torch.arange(tokens) < 8
    routed = routing(logits, k)
    total = 0.0
    for expert in range(count):
        share = sum(expert in routed.experts[t].tolist() for t in range(8)) / 8
        likely = sum(float(logits[t].softmax(-1)[expert]) for t in range(8)) / 8
        total += share * likely
    assert load_balancing_loss(routed, real).item() == pytest.approx(count * total / k, rel=1e-5)


def test_it_is_1_when_balanced_and_most_when_all_go_one_way() -> None:
    even = torch.eye(4).repeat(5, 1) * 1e-3
    assert load_balancing_loss(routing(even, 1)).item() == pytest.approx(1.0, abs=1e-3)
    one_way = torch.tensor([[50.0, 0.0, 0.0, 0.0]]).repeat(20, 1)
    assert load_balancing_loss(routing(one_way, 1)).item() == pytest.approx(4.0, abs=1e-4)
    assert load_balancing_loss(routing(one_way, 1), torch.zeros(20, dtype=torch.bool)).item() == 0


def test_lowering_it_balances() -> None:
    torch.manual_seed(3)
    router, x = TopKRouter(8, 4, 1), torch.randn(400, 8) + 1.0
    with torch.no_grad():
        router.weight[0] += 0.5
    optimizer = torch.optim.Adam(router.parameters(), lr=0.05)

    def most() -> float:
        return float(torch.bincount(router(x).experts.flatten(), minlength=4).max()) / 400

    before = most()
    for _ in range(60):
        optimizer.zero_grad()
        load_balancing_loss(router(x)).backward()
        optimizer.step()
    assert before > 0.8 and most() < 0.4


def test_the_z_loss_by_its_definition() -> None:
    logits, real = torch.randn(7, 3), torch.tensor([True] * 5 + [False] * 2)
    expected = [math.log(sum(math.exp(float(v)) for v in row)) ** 2 for row in logits[:5]]
    assert z_loss(routing(logits, 1), real).item() == pytest.approx(sum(expected) / 5, rel=1e-5)

"""APOLLO and APOLLO-Mini against their equations, a matrix at a time in numpy."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from bitray.optim import Apollo, ApolloMini
from bitray.optim.apollo import projection

SHAPES = [(6, 10), (10, 6), (5, 5)]
BETAS, EPS, DECAY, LR = (0.8, 0.9), 1e-6, 0.1, 0.05


def _model() -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(n, m, bias=False) for m, n in SHAPES])
    return model


class Reference:
    """Paper, algorithm 1, on a matrix whose rows are the smaller dimension."""

    def __init__(self, rank: int, scale: float, tensorwise: bool, refresh: int) -> None:
        self.rank, self.scale, self.tensorwise, self.refresh = rank, scale, tensorwise, refresh
        self.first = self.second = 0.0
        self.steps, self.norm = 0, None

    def update(self, gradient: np.ndarray, place: int) -> np.ndarray:
        epoch = self.steps // self.refresh
        draw = projection(len(gradient), self.rank, epoch * 1_000_003 + place, torch.device("cpu"))
        low = draw.double().numpy().T @ gradient
        self.steps += 1
        self.first = BETAS[0] * self.first + (1 - BETAS[0]) * low
        self.second = BETAS[1] * self.second + (1 - BETAS[1]) * low**2
        adapted = (self.first / (1 - BETAS[0] ** self.steps)) / (
            np.sqrt(self.second / (1 - BETAS[1] ** self.steps)) + EPS
        )
        axis = None if self.tensorwise else 0
        ratio = np.sqrt((adapted**2).sum(axis)) / np.sqrt((low**2).sum(axis))
        update = gradient * ratio
        norm = np.sqrt((update**2).sum())
        if self.norm is not None and norm > 1.01 * self.norm:
            update *= 1.01 * self.norm / norm
        self.norm = np.sqrt((update**2).sum())
        return self.scale * update


@pytest.mark.parametrize("kind", [Apollo, ApolloMini])
def test_follows_the_paper(kind):
    shared = {"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": DECAY, "refresh_every": 3}
    settings = Apollo(rank=2, scale=1.5, **shared) if kind is Apollo else ApolloMini(**shared)
    rank, scale = (2, 1.5) if kind is Apollo else (1, 128**0.5)
    references = [Reference(rank, scale, kind is ApolloMini, 3) for _ in SHAPES]
    model, rng = _model(), np.random.default_rng(0)
    optimizer = settings.build(model)
    expected = [layer.weight.detach().double().numpy() for layer in model.layers]
    for step in range(8):
        for place, (layer, reference) in enumerate(zip(model.layers, references, strict=True)):
            gradient = rng.normal(size=SHAPES[place]) * (5 if step == 4 else 1)
            layer.weight.grad = torch.tensor(gradient).float()
            tall = SHAPES[place][0] > SHAPES[place][1]
            update = reference.update(gradient.T if tall else gradient, place)
            old = expected[place]
            expected[place] = old - LR * DECAY * old - LR * (update.T if tall else update)
        optimizer.step()
    for layer, weight in zip(model.layers, expected, strict=True):
        np.testing.assert_allclose(layer.weight.detach().numpy(), weight, rtol=1e-4, atol=1e-5)


def test_the_state_is_as_small_as_its_rank():
    model = _model()
    for kind, rank in ((Apollo(rank=2), 2), (ApolloMini(), 1), (Apollo(), 256)):
        optimizer = kind.build(model)
        for layer in model.layers:
            layer.weight.grad = torch.ones_like(layer.weight)
        optimizer.step()
        for layer, shape in zip(model.layers, SHAPES, strict=True):
            state = optimizer.state[layer.weight]
            assert state["exp_avg"].shape == (max(shape), min(rank, *shape))
            assert state["exp_avg_sq"].shape == state["exp_avg"].shape


def test_projections_keep_lengths_in_the_mean_and_change_with_their_seed():
    cpu = torch.device("cpu")
    vector = torch.ones(64)
    draws = [projection(64, 4, seed, cpu) for seed in range(300)]
    assert torch.equal(draws[7], projection(64, 4, 7, cpu))
    assert not torch.equal(draws[7], draws[8])
    squares = torch.stack([(vector @ draw).square().sum() for draw in draws])
    assert squares.mean().item() == pytest.approx(64, rel=0.15)


def test_an_update_grows_slowly():
    model = _model()
    optimizer = Apollo(lr=1.0, weight_decay=0.0, rank=2).build(model)
    weight, moves = model.layers[0].weight, []
    for size in (1.0, 1.0, 1000.0, 1000.0):
        before = weight.detach().clone()
        for layer in model.layers:
            layer.weight.grad = torch.full_like(layer.weight, size)
        optimizer.step()
        moves.append((weight.detach() - before).norm().item())
    assert all(b <= 1.0101 * a for a, b in itertools.pairwise(moves))

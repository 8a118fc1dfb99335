"""Salient columns and sparse activations, against their definitions."""

import math

import jaxtyping
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from bitray.nn import BitLinear, int8_per_token, set_strength, ternary
from bitray.nn.curricula import (
    column_ranges,
    load_column_ranges,
    set_saliency,
    set_sparsity,
    track_columns,
    update_columns,
)
from bitray.nn.sparse import sparse


def _layer(strength: float = 1.0) -> BitLinear:
    torch.manual_seed(0)
    layer = BitLinear(48, 40, bias=True, subln=True)
    set_strength(layer, strength)
    return layer


def _x(*shape: int) -> Tensor:
    return torch.randn(*shape, 48, generator=torch.Generator().manual_seed(1))


def _reference(layer: BitLinear, x: Tensor, strength: float, salient: list[int]) -> Tensor:
    """By autograd in fp64, a column at a time."""
    codes, scale = ternary(layer.weight)
    weight, quantised = layer.weight.double(), codes.double() * scale.double()
    columns = [
        weight[:, j] + (0 if j in salient else strength) * (quantised - weight)[:, j].detach()
        for j in range(48)
    ]
    x_codes, x_scale = int8_per_token(x)
    x = x.double() + strength * (x_codes.double() * x_scale.double() - x.double()).detach()
    return F.linear(x, torch.stack(columns, 1), layer.bias.double())


@pytest.mark.parametrize("strength", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("share", [0.001, 0.1, 1.0])
def test_salient_columns_stay_as_they_are_and_the_rest_has_its_strength(strength, share):
    layer, x = _layer(strength), _x(3, 7).requires_grad_()
    layer.subln = None
    track_columns(layer)
    set_saliency(layer, share)
    ranges = layer.weight.abs().amax(0)
    order = sorted(range(48), key=lambda j: (-ranges[j].item(), j))
    salient = order[: max(1, math.floor(share * 48))]
    assert layer.salient.nonzero().flatten().tolist() == sorted(salient)
    out, expected = layer(x), _reference(layer, x, strength, salient)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    wanted = [x, layer.weight, layer.bias]
    got = torch.autograd.grad(out, wanted, grad)
    for one, other in zip(got, torch.autograd.grad(expected, wanted, grad.double()), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_of_equal_columns_those_of_lower_index_are_salient():
    layer = _layer()
    layer.weight.data.fill_(0.5)
    layer.weight.data[3, 40] = -0.9
    track_columns(layer)
    set_saliency(layer, 0.1)
    assert layer.salient.nonzero().flatten().tolist() == [0, 1, 2, 40]


def test_the_running_range_begins_with_the_weights_and_follows_them():
    layer = _layer()
    track_columns(layer)
    first = layer.weight.abs().amax(0)
    assert torch.equal(layer.column_range, first)
    expected = first.double()
    for step in range(5):
        layer.weight.data.mul_(-1.0 - 0.1 * step)
        update_columns(layer, 0.9)
        expected = 0.9 * expected + 0.1 * layer.weight.abs().amax(0).double()
        torch.testing.assert_close(layer.column_range.double(), expected, rtol=1e-6, atol=0)
    track_columns(layer)
    torch.testing.assert_close(layer.column_range.double(), expected, rtol=1e-6, atol=0)
    other = _layer()
    load_column_ranges(other, column_ranges(layer))
    assert torch.equal(other.column_range, layer.column_range)


def _largest_by_hand(token: list[float], kept: int) -> list[float]:
    order = sorted(range(len(token)), key=lambda j: -abs(token[j]))[:kept]
    return [value if j in order else 0.0 for j, value in enumerate(token)]


@given(st.integers(1, 19), st.integers(1, 19), st.integers(0, 2**30))
def test_of_every_group_the_largest_are_kept(width, kept, seed):
    x = torch.randn(5, width, generator=torch.Generator().manual_seed(seed))
    kept = min(kept, width)
    expected = [_largest_by_hand(token, kept) for token in x.tolist()]
    assert sparse(x, torch.tensor(kept), None).tolist() == expected
    n, m = min(kept, 3), 4
    cut = [[token[at : at + m] for at in range(0, width, m)] for token in x.tolist()]
    blocks = [[v for part in token for v in _largest_by_hand(part, n)] for token in cut]
    assert sparse(x, torch.tensor(n), m).tolist() == blocks


def test_exactly_so_many_are_kept_of_equal_ones():
    for block, count in ((None, 7), (4, 24)):
        x = torch.ones(6, 48)
        kept = torch.tensor(7 if block is None else 2)
        assert (sparse(x, kept, block) != 0).sum(-1).tolist() == [count] * 6


def test_sparsity_comes_after_the_norm_and_its_gradient_passes_straight_through():
    layer, x = _layer(), _x(3, 7).requires_grad_()
    set_sparsity(layer, lambda size: 19)
    bare = _layer()
    normed = layer.subln(x).detach().requires_grad_()
    bare.subln = None
    kept = torch.tensor([_largest_by_hand(t, 19) for t in normed.flatten(0, 1).tolist()])
    kept = kept.view_as(normed).requires_grad_()
    assert torch.equal(layer(x), bare(kept))
    grad = torch.randn(3, 7, 40)
    layer.subln = None
    got = torch.autograd.grad(layer(normed), [normed, layer.weight], grad)
    expected = torch.autograd.grad(bare(kept), [kept, bare.weight], grad)
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("strength", [0.3, 1.0])
def test_evaluation_knows_neither(strength):
    layer, x = _layer(strength), _x(4)
    plain = layer(x)
    track_columns(layer)
    set_saliency(layer, 0.5)
    set_sparsity(layer, lambda size: size // 4)
    assert not torch.allclose(layer(x), plain)
    assert torch.equal(layer.eval()(x), plain)
    set_saliency(layer.train(), 0.0)
    set_sparsity(layer, lambda size: size)
    assert torch.equal(layer(x), plain)
    assert layer.salient is None and layer.kept is None


def test_neither_is_a_part_of_the_model():
    layer = nn.Sequential(_layer())
    names = set(layer.state_dict())
    track_columns(layer)
    set_saliency(layer, 0.5)
    set_sparsity(layer, lambda size: 3, block=8)
    assert set(layer.state_dict()) == names
    assert layer[0].salient.dtype == torch.bool


def test_a_change_of_columns_or_of_how_many_are_kept_does_not_recompile():
    compilations = 0

    def count(graph, _):
        nonlocal compilations
        compilations += 1
        return graph

    jaxtyping.config.update("jaxtyping_disable", True)  # the checks cannot be compiled
    try:
        layer, x = _layer(), _x(3)
        track_columns(layer)
        compiled, seen = torch.compile(layer, backend=count, fullgraph=True), []
        for step in range(6):
            set_saliency(layer, 0.5 - 0.05 * step)
            set_sparsity(layer, lambda size, step=step: size - 1 - step)
            torch.testing.assert_close(compiled(x), layer(x))
            seen.append(compilations)
        assert set(seen) == {1}
    finally:
        jaxtyping.config.update("jaxtyping_disable", False)

"""The low-rank correction beside a ternary product."""

import pytest
import torch
from pydantic import ValidationError

from bitray.nn import BitLinear, LowRank, LowRankCorrection, int8_per_token, rank_of
from bitray.settings import UserError


def corrected(rank: int = 3, subln: bool = False) -> BitLinear:
    torch.manual_seed(0)
    layer = BitLinear(12, 8, bias=True, subln=subln)
    layer.correction = LowRankCorrection(12, 8, rank)
    return layer


@pytest.mark.parametrize("subln", [False, True])
def test_it_adds_u_v_x_of_the_input_that_is_not_quantised(subln: bool) -> None:
    layer, x = corrected(subln=subln), torch.randn(2, 5, 12)
    assert layer.correction is not None
    torch.nn.init.normal_(layer.correction.u)
    codes, scale = layer.quantized()
    inner = x if layer.subln is None else layer.subln(x)
    ints, token = int8_per_token(inner)
    ternary = (ints * token) @ (codes * scale).T + layer.bias
    expected = ternary + inner @ layer.correction.v @ layer.correction.u.T
    torch.testing.assert_close(layer(x), expected)
    for weight in (layer.correction.u, layer.correction.v):  # what is read is what is trained
        assert torch.autograd.grad(layer(x).square().sum(), weight)[0].abs().sum() > 0


def test_the_default_start_changes_nothing_and_one_step_changes_the_output() -> None:
    layer, x = corrected(), torch.randn(7, 12)
    plain = BitLinear(12, 8, bias=True)
    plain.load_state_dict({k: v for k, v in layer.state_dict().items() if "correction" not in k})
    assert torch.equal(layer(x), plain(x))
    assert layer.correction is not None
    optimizer = torch.optim.AdamW(layer.correction.parameters(), lr=1e-2)
    (layer(x) - torch.randn(7, 8)).square().sum().backward()
    optimizer.step()
    assert (layer(x) - plain(x)).abs().max() > 1e-3
    assert layer.correction.v.abs().max() <= 12**-0.5


def test_below_full_strength_it_is_added_to_the_blend() -> None:
    layer, x = corrected(), torch.randn(7, 12)
    layer.strength.fill_(0.0)
    layer.full_strength = False
    assert layer.correction is not None
    torch.nn.init.normal_(layer.correction.u)
    matrix = layer.weight + layer.correction.u @ layer.correction.v.T
    torch.testing.assert_close(layer(x), x @ matrix.T + layer.bias)


@pytest.mark.parametrize(
    ("rank", "sizes", "expected"),
    [(0.1, (64, 40), 4), (0.1, (7, 90), 1), (0.99, (10, 10), 9), (5, (5, 8), 5), (1, (5, 8), 1)],
)
def test_ranks(rank: float | int, sizes: tuple[int, int], expected: int) -> None:
    assert rank_of(rank, *sizes) == expected
    assert rank_of(rank, *sizes[::-1]) == expected


def test_impossible_ranks_are_refused() -> None:
    with pytest.raises(UserError, match="9 is larger than the smaller side of a layer of 8 inputs"):
        rank_of(9, 8, 100)
    with pytest.raises(ValidationError, match=r"2.5 is neither a share below 1 nor a whole number"):
        LowRank(rank=2.5)
    with pytest.raises(ValidationError):
        LowRank(rank=0)

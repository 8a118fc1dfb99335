"""Layers without masters against those with them: the same numbers, and a quarter of the bytes."""

import pytest
import torch
from torch import nn

from bitray.nn import BitLinear, LowRankCorrection, bit_linears
from bitray.nn.frozen import FrozenBitLinear, freeze


@pytest.mark.parametrize("subln", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_computes_the_same_to_the_bit(dtype: torch.dtype, bias: bool, subln: bool) -> None:
    torch.manual_seed(0)
    layer = BitLinear(48, 32, bias=bias, subln=subln)
    frozen = FrozenBitLinear(layer)
    for shape in ((48,), (1, 48), (3, 5, 48), (0, 48)):
        x = torch.randn(*shape, dtype=dtype)
        assert torch.equal(frozen(x), layer(x))
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(4, 48)
        assert torch.equal(frozen(x), layer(x)) and frozen(x).dtype == torch.bfloat16


def test_a_model_is_frozen_where_it_can_be() -> None:
    """A layer that holds something more keeps computing it."""
    more = BitLinear(16, 16)
    more.correction = LowRankCorrection(16, 16, 2)
    nn.init.normal_(more.correction.u)
    model = nn.Sequential(BitLinear(16, 16, subln=True), nn.Linear(16, 16), more)
    x, before = torch.randn(3, 16), sum(p.numel() for p in model.parameters())
    expected = model(x)
    freeze(model)
    assert torch.equal(model(x), expected)
    assert bit_linears(model) == [more]
    assert sum(p.numel() for p in model.parameters()) == before - 256
    assert model[0].codes.dtype == torch.int8 and "codes" in model[0].state_dict()

"""The product in 8-bit floats against the same rounding done by hand in fp64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from bitray.nn import BitLinear, int8_per_token, set_strength, ternary
from bitray.nn.fp8 import scaled_product, scaled_rows

on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() < (9, 0),
    reason="no GPU of compute capability 9.0",
)


def e4m3(values: Tensor) -> Tensor:
    """To the nearest of 4 significant bits, ties to even; subnormal below 2^-6. From the format."""
    v = values.double().numpy()
    exponent = np.maximum(np.floor(np.log2(np.maximum(np.abs(v), 2.0**-30))), -6)
    step = 2.0 ** (exponent - 3)
    return torch.from_numpy(np.round(v / step) * step)


def by_rows(values: Tensor) -> Tensor:
    scale = (values.abs().amax(-1, keepdim=True).float() / 448).double()
    return e4m3((values.float() / scale.float()).clamp(-448, 448)) * scale


def make_layer(out: int = 48, width: int = 64, bias: bool = True) -> BitLinear:
    torch.manual_seed(0)
    layer = BitLinear(width, out, bias=bias)
    layer.fp8 = torch.bfloat16
    return layer


def expected(layer: BitLinear, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients with every factor rounded as it should be, the sums exact."""
    codes, scale = int8_per_token(x)
    codes8 = e4m3(codes.float())
    signs, weight_scale = ternary(layer.weight)
    weight = signs.double() * weight_scale.double()
    out = codes8 * scale.double() @ weight.T
    flat, tokens = grad.flatten(0, -2).double(), scale.flatten(0, -2)
    grad_x = (by_rows(flat) @ weight).view(x.shape)
    grad_weight = by_rows((flat.float() * tokens).T) @ codes8.flatten(0, -2)
    bias = [] if layer.bias is None else [flat.sum(0)]
    return [out if layer.bias is None else out + layer.bias.double(), grad_x, grad_weight, *bias]


def found(layer: BitLinear, x: Tensor, grad: Tensor) -> list[Tensor]:
    x = x.detach().requires_grad_()
    out = layer(x)
    out.backward(grad.to(out.dtype))
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    return [out.detach(), *gradients]


def test_rounding_is_that_of_the_format() -> None:
    values = torch.cat([torch.linspace(-448, 448, 4001), torch.linspace(-0.05, 0.05, 999)])
    assert torch.equal(values.to(torch.float8_e4m3fn).double(), e4m3(values))


def test_e4m3_holds_80_of_the_256_codes_of_an_activation() -> None:
    codes = torch.arange(-128, 128).double()
    assert (e4m3(codes) == codes).sum() == 80


@pytest.mark.parametrize("shape", [(32,), (3, 7), (1,), (2, 3, 5)])
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients(shape: tuple[int, ...], bias: bool) -> None:
    """Also where the number of tokens is no multiple of 16."""
    layer = make_layer(bias=bias)
    draw = torch.Generator().manual_seed(1)
    x, grad = (torch.randn(*shape, n, generator=draw) for n in (64, 48))
    got, wanted = found(layer, x, grad), expected(layer, x, grad)
    assert [each.shape for each in got] == [each.shape for each in wanted]
    for a, b in zip(got, wanted, strict=True):  # sums are rounded to bf16
        torch.testing.assert_close(a.double(), b, rtol=2**-8, atol=1e-3 * b.abs().max().item())


def test_it_is_near_the_exact_product_and_not_equal() -> None:
    layer, exact = make_layer(256, 512), make_layer(256, 512)
    exact.fp8 = None
    draw = torch.Generator().manual_seed(2)
    x, grad = torch.randn(128, 512, generator=draw), torch.randn(128, 256, generator=draw)
    for a, b in zip(found(layer, x, grad)[:3], found(exact, x, grad)[:3], strict=True):
        error = ((a - b).norm() / b.norm()).item()
        assert 0.005 < error < 0.04


def test_masters_are_fp32_and_evaluation_is_exact() -> None:
    layer = make_layer()
    x = torch.randn(16, 64)
    codes, _ = ternary(layer.weight)
    before = layer.weight.detach().clone()
    layer(x).sum().backward()
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32
    assert torch.equal(layer.weight, before) and torch.equal(layer.quantized()[0], codes)
    exact = make_layer()
    exact.fp8 = None
    assert not torch.equal(layer(x), exact(x))
    assert torch.equal(layer.eval()(x), exact.eval()(x))
    for each in (layer.train(), exact.train()):
        set_strength(each, 0.5)
    assert torch.equal(layer(x), exact(x)), "below full strength there are no integers to round"


def test_rows_of_zeros_stay_zero() -> None:
    values, scale = scaled_rows(torch.zeros(16, 16))
    assert torch.equal(values.float() * scale, torch.zeros(16, 16))
    layer = make_layer()
    for each in found(layer, torch.zeros(4, 64), torch.zeros(4, 48)):
        assert each.isfinite().all()


@pytest.mark.gpu
@on_a_gpu
def test_a_gpu_multiplies_rows_of_their_own_scale() -> None:
    draw = torch.Generator().manual_seed(3)
    a, b = (torch.randn(n, 512, generator=draw) * torch.rand(n, 1) for n in (100, 256))
    (x, s), (y, t) = (scaled_rows(each.cuda()) for each in (a, b))
    got = scaled_product(x, y, s, t.t(), torch.bfloat16).cpu()
    wanted = by_rows(a) @ by_rows(b).T
    torch.testing.assert_close(
        got.double(), wanted, rtol=2**-7, atol=1e-3 * wanted.abs().max().item()
    )


@pytest.mark.gpu
@on_a_gpu
def test_a_layer_on_a_gpu() -> None:
    layer = make_layer(256, 512)
    draw = torch.Generator().manual_seed(4)
    x, grad = torch.randn(100, 512, generator=draw), torch.randn(100, 256, generator=draw)
    wanted = expected(layer, x, grad)
    got = found(layer.cuda(), x.cuda(), grad.cuda())
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(
            a.cpu().double(), b, rtol=2**-7, atol=2e-3 * b.abs().max().item()
        )

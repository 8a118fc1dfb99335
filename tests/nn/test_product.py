"""The three ways to multiply integers, against 64-bit integers."""

import pytest
import torch
from torch import Tensor

from bitray.nn import BitLinear, int8_per_token
from bitray.nn.product import kernel_problem, ternary_product

GPU = torch.device("cuda")
on_a_gpu = pytest.mark.skipif(
    not torch.cuda.is_available() or kernel_problem(GPU) is not None,
    reason="no GPU that the int8 kernel runs on",
)


def factors(rows: int, width: int, out: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(rows + width + out)
    codes = torch.randint(-128, 128, (rows, width), generator=draw, dtype=torch.int8)
    signs = torch.randint(-1, 2, (out, width), generator=draw, dtype=torch.int8)
    scale, bias = torch.rand(rows, 1, generator=draw), torch.randn(out, generator=draw)
    return [codes, scale, signs, torch.tensor(0.02), bias]


def exact(factors: list[Tensor], bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    codes, scale, signs, weight_scale = factors
    out = (codes.long() @ signs.long().T).float() * (scale * weight_scale)
    return (out if bias is None else out + bias).to(dtype)


@pytest.mark.parametrize("int8_hardware", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_products_on_cpus(
    int8_hardware: bool, biased: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("bitray.nn.product._VNNI", int8_hardware)
    *given, bias = factors(33, 96, 40)
    used = bias if biased else None
    got = ternary_product(*given, used, torch.float32)
    assert torch.equal(got, exact(given, used, torch.float32))


def test_the_kernel_is_for_gpus() -> None:
    assert kernel_problem(torch.device("cpu")) == "needs GPUs, these workers have CPUs"


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("shape", [
    (1024, 1024, 1024), (1025, 1040, 1026), (4099, 9728, 2560), (2048, 1024, 151),
])  # fmt: skip
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernel_is_exact(shape: tuple[int, int, int], biased: bool, dtype: torch.dtype) -> None:
    from bitray.nn.kernel import scaled_int8_product

    *given, bias = factors(*shape)
    wanted = exact(given, bias if biased else None, dtype)
    codes, scale, signs, weight_scale = (each.cuda() for each in given)
    used = bias.cuda() if biased else None
    got = scaled_int8_product(codes, signs, scale.view(-1), weight_scale, used, dtype).cpu()
    if biased:  # one rounding fewer where the two are fused
        torch.testing.assert_close(got, wanted)
    else:
        assert torch.equal(got, wanted)


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_of_the_kernel_compiled(bias: bool) -> None:
    torch.manual_seed(0)
    layer, x = BitLinear(1024, 1536, bias=bias).cuda(), torch.randn(4, 512, 1024, device="cuda")
    layer.int8_kernel = True
    found = []
    for call in (layer, torch.compile(layer)):
        given = x.clone().requires_grad_()
        with torch.autocast("cuda", torch.bfloat16):
            out = call(given)
        out.float().square().sum().backward()
        found.append([out, given.grad, layer.weight.grad])
        layer.weight.grad = None
    given = [each.cpu() for each in (*int8_per_token(x), *layer.quantized())]
    wanted = exact(given, layer.bias.detach().cpu() if bias else None, torch.bfloat16)
    torch.testing.assert_close(found[0][0].cpu(), wanted)
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(
            compiled, eager, rtol=2**-6, atol=2**-6 * eager.abs().max().item()
        )

"""BitLinear: exact products, the straight-through gradients, and what may not change its codes."""

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from bitray.nn import BitLinear, SubLN, int8_per_token, set_strength, strength_of, ternary
from bitray.settings import UserError

STRENGTHS = [0.0, 0.3, 0.9, 1.0]


def _layer(bias: bool = True, subln: bool = False, strength: float = 1.0) -> BitLinear:
    torch.manual_seed(0)
    layer = BitLinear(48, 40, bias=bias, subln=subln, eps=1e-6)
    set_strength(layer, strength)
    return layer


def _x(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, 48, generator=torch.Generator().manual_seed(seed))


def reference(layer: BitLinear, x: Tensor, strength: float) -> Tensor:
    """The definition, by autograd in fp64: `W + s sg(Q(W) - W)`, the same for x."""
    codes, scale = ternary(layer.weight)
    weight, quantised = layer.weight.double(), codes.double() * scale.double()
    weight = weight + strength * (quantised - weight).detach()
    x_codes, x_scale = int8_per_token(x)
    x = x.double()
    x = x + strength * (x_codes.double() * x_scale.double() - x).detach()
    return F.linear(x, weight, None if layer.bias is None else layer.bias.double())


def _gradients(out: Tensor, layer: BitLinear, x: Tensor) -> list[Tensor]:
    grad = torch.randn(out.shape, generator=torch.Generator().manual_seed(2))
    wanted = [x, *layer.parameters()]
    return list(torch.autograd.grad(out, wanted, grad.to(out.dtype)))


@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("bias", [True, False])
def test_output_and_gradients_are_the_straight_through_formulas(
    strength: float, bias: bool
) -> None:
    layer, x = _layer(bias, strength=strength), _x(3, 7).requires_grad_()
    out, expected = layer(x), reference(layer, x, strength)
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-6)
    pairs = zip(_gradients(out, layer, x), _gradients(expected, layer, x), strict=True)
    for got, wanted in pairs:
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


def test_full_strength_is_exact() -> None:
    """Integers in, integers out: nothing but the one scaling may round."""
    layer, x = _layer(bias=False), _x(11)
    codes, scale = layer.quantized()
    x_codes, x_scale = int8_per_token(x)
    product = x_codes.long() @ codes.long().T
    assert torch.equal(layer(x), product.float() * (x_scale * scale))


def test_the_two_integer_products_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = _layer(), _x(5, 3)
    outputs = []
    for int8_hardware in (True, False):
        monkeypatch.setattr("bitray.nn.product._VNNI", int8_hardware)
        outputs.append(layer(x))
    assert torch.equal(*outputs)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (2, 1), (7, 3), (128, 64)])
def test_products_of_odd_shapes_are_exact(shape: tuple[int, int]) -> None:
    # _int_mm gives wrong numbers for width 1; the kernel has to know where not to use it
    out, width = shape
    layer = BitLinear(width, out)
    for tokens in (0, 1, 2, 33):
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens))
        torch.testing.assert_close(layer(x).double(), reference(layer, x, 1.0))


def test_strength_zero_is_the_dense_layer_bit_for_bit() -> None:
    dense, x = nn.Linear(48, 40), _x(3, 7).requires_grad_()
    layer = BitLinear.from_linear(dense, subln=False, eps=1e-6)
    set_strength(layer, 0.0)
    assert torch.equal(layer(x), dense(x))
    pairs = zip(_gradients(layer(x), layer, x), _gradients(dense(x), layer, x), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_quantized_is_what_the_forward_uses(strength: float) -> None:
    """Unit vectors pick out the columns of the effective weight."""
    layer = _layer(bias=False, strength=strength)
    codes, scale = layer.quantized()
    effective = layer(torch.eye(48)).T  # one-hot tokens are exact in int8
    expected = torch.lerp(layer.weight, codes * scale, strength)
    torch.testing.assert_close(effective, expected, rtol=1e-6, atol=0)


def test_subln_comes_before_the_quantiser_and_learns() -> None:
    layer, x = _layer(subln=True), (1000 * _x(4)).requires_grad_()
    assert layer.subln is not None
    nn.init.uniform_(layer.subln.weight, 0.5, 2.0)
    normed = x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * layer.subln.weight
    bare = _layer()
    bare.load_state_dict({k: v for k, v in layer.state_dict().items() if "subln" not in k})
    torch.testing.assert_close(layer(x), bare(normed), rtol=1e-5, atol=1e-6)
    assert all(g.abs().sum() > 0 for g in _gradients(layer(x), layer, x))


def test_subln_returns_fp32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        assert SubLN(48)(_x(2).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("strength", STRENGTHS)
def test_autocast_rounds_products_but_no_decision(strength: float) -> None:
    layer, x = _layer(subln=True, strength=strength), _x(6, 5).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.float(), layer(x), rtol=2e-2, atol=2e-2)
    got = _gradients(out, layer, x)
    for one, expected in zip(got, _gradients(layer(x), layer, x), strict=True):
        assert one.dtype == torch.float32  # masters get fp32 gradients
        assert (one - expected).norm() < 2e-2 * expected.norm()


def test_narrow_activations_without_autocast_keep_fp32_masters() -> None:
    layer, x = _layer(subln=True), _x(4).bfloat16()
    assert layer(x).dtype == torch.bfloat16
    torch.testing.assert_close(layer(x).float(), layer(x.float()), rtol=2e-2, atol=2e-2)


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    layer, x = _layer(subln=True), _x(2, 9)
    changed = x.clone()
    changed[0, 4] = 1e4
    same = (layer(changed) == layer(x)).all(-1)
    assert same.sum() == 17
    assert not same[0, 4]


@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_activation_checkpointing_changes_nothing(strength: float) -> None:
    layer, x = _layer(subln=True, strength=strength), _x(5).requires_grad_()
    plain = _gradients(layer(x), layer, x)
    again = _gradients(checkpoint(layer, x, use_reentrant=False), layer, x)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_frozen_weights_cost_no_gradient() -> None:
    for strength in (0.5, 1.0):
        layer, x = _layer(strength=strength).requires_grad_(False), _x(2).requires_grad_()
        layer(x).sum().backward()
        assert layer.weight.grad is None
        assert x.grad is not None


@pytest.mark.usefixtures("unchecked")
def test_a_change_of_strength_does_not_recompile() -> None:
    compilations = 0

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> torch.fx.GraphModule:
        nonlocal compilations
        compilations += 1
        return graph

    layer, x = _layer(subln=True), _x(3)
    compiled = torch.compile(layer, backend=count)
    seen = []
    for strength in (0.1, 0.2, 0.7, 1.0, 1.0):
        set_strength(layer, strength)
        torch.testing.assert_close(compiled(x), layer(x))
        seen.append(compilations)
    assert seen[0] == seen[2]
    assert seen[3] == seen[4]


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_compiled_kernels_agree(strength: float) -> None:
    layer, x = _layer(subln=True, strength=strength), _x(6, 7).requires_grad_()
    compiled = torch.compile(layer, fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x), rtol=1e-5, atol=1e-6)
    pairs = zip(_gradients(compiled(x), layer, x), _gradients(layer(x), layer, x), strict=True)
    for got, expected in pairs:
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------- strength


def test_strength_is_set_below_a_module_and_nowhere_else() -> None:
    student, teacher = nn.Sequential(_layer(), nn.ReLU()), nn.Sequential(_layer())
    set_strength(student, 0.25)
    assert strength_of(student) == 0.25
    assert strength_of(teacher) == 1.0
    assert strength_of(nn.Linear(2, 2)) == 1.0


def test_strength_is_no_part_of_the_state_and_moves_with_the_module() -> None:
    layer = _layer(strength=0.5)
    assert set(layer.state_dict()) == {"weight", "bias"}
    assert layer.strength.dtype == torch.float32
    assert layer.to("meta").strength.device.type == "meta"


@pytest.mark.parametrize("strength", [-0.1, 1.1, float("nan")])
def test_a_strength_outside_of_its_range_is_refused(strength: float) -> None:
    with pytest.raises(UserError, match="between 0 and 1"):
        set_strength(_layer(), strength)


def test_from_linear_takes_over_parameters() -> None:
    dense = nn.Linear(8, 6)
    layer = BitLinear.from_linear(dense, subln=True, eps=1e-6)
    assert layer.weight is dense.weight
    assert layer.bias is dense.bias
    assert layer.subln is not None and torch.equal(layer.subln.weight, torch.ones(8))
    assert not any(t.is_meta for t in [*layer.parameters(), *layer.buffers()])


def test_from_linear_makes_fp32_masters() -> None:
    dense = nn.Linear(8, 6, bias=False, dtype=torch.bfloat16)
    layer = BitLinear.from_linear(dense, subln=False, eps=1e-6)
    assert layer.weight.dtype == torch.float32
    assert torch.equal(layer.weight, dense.weight.float())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("strength", [0.5, 1.0])
def test_a_gpu_takes_the_same_decisions(strength: float) -> None:
    layer, x = _layer(subln=True, strength=strength), _x(6, 7)
    codes, scale = layer.quantized()
    expected = layer(x)
    layer.cuda()
    assert torch.equal(layer.quantized()[0].cpu(), codes)
    assert torch.equal(layer.quantized()[1].cpu(), scale)
    torch.testing.assert_close(layer(x.cuda()).cpu(), expected, rtol=1e-3, atol=1e-3)  # TF32
    with torch.autocast("cuda", torch.bfloat16):
        narrow = layer(x.cuda())
    torch.testing.assert_close(narrow.float().cpu(), expected, rtol=3e-2, atol=3e-2)

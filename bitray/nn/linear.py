"""BitLinear: a linear layer with ternary weights and 8-bit activations, trained straight through.

Two kernels, one meaning. At strength 1 the product is taken over the integer codes, which is
exact; below 1 over the blended values. Both recompute the quantised weight in the backward from the
master, which FSDP has gathered again by then, so no copy of a weight lives between the passes.
"""

from typing import Any

import torch
from jaxtyping import Float, Float32, Int8
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

from bitray.nn.correction import LowRankCorrection
from bitray.nn.fp8 import TernaryFP8
from bitray.nn.norm import SubLN
from bitray.nn.product import ternary_product
from bitray.nn.quantize import (
    int8_per_token,
    ternary,
    ternary_codes,
    ternary_scale,
    token_codes,
    token_range,
)
from bitray.nn.sparse import sparse
from bitray.settings import UserError


class BitLinear(nn.Module):
    """`y = Q(W) Qa(SubLN(x)) + b` with an fp32 master `weight` [out, in] (BitNet b1.58), and where
    it has a `correction` that of SubLN(x) added.

    `strength` s blends `W + s (Q(W) - W)`, the same for x: 0 is exactly the dense layer. It is a
    buffer so that a change of it does not recompile; it is set by `set_strength` alone. Output has
    the dtype of the input, or of autocast.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None
    strength: Tensor
    salient: Tensor | None
    """Columns that training leaves unquantised, and the running range of all: `nn.curricula`."""
    column_range: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        subln: bool = False,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None
        self.subln = SubLN(in_features, eps) if subln else None
        self.correction: LowRankCorrection | None = None
        self.register_buffer("strength", torch.ones(()), persistent=False)
        self.full_strength = True
        self.int8_kernel = False
        """Multiply codes on a GPU's int8 tensor cores (`nn.kernel`), which is exact too."""
        self.fp8: torch.dtype | None = None
        """Train at full strength by the approximate product in 8-bit floats, rounded to this."""
        self.register_buffer("salient", None, persistent=False)
        self.register_buffer("column_range", None, persistent=False)
        self.kept: Tensor | None = None
        """Activations that training keeps of each group of `block`, or of a token."""
        self.block: int | None = None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """As `nn.Linear` does."""
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)
        if self.bias is not None:
            bound = self.in_features**-0.5
            nn.init.uniform_(self.bias, -bound, bound)

    @classmethod
    def from_linear(cls, linear: nn.Linear, subln: bool, eps: float) -> "BitLinear":
        """Take over the weights of a dense layer; they become fp32 masters."""
        with torch.device("meta"):  # nothing is drawn at random just to be replaced
            layer = cls(linear.in_features, linear.out_features, linear.bias is not None)
        device = linear.weight.device
        layer.weight = _master(linear.weight)
        layer.bias = None if linear.bias is None else _master(linear.bias)
        layer.subln = SubLN(linear.in_features, eps).to(device) if subln else None
        layer.strength = torch.ones((), device=device)
        return layer

    def quantized(self) -> tuple[Int8[Tensor, "out in"], Float32[Tensor, ""]]:
        """The codes and the scale that the forward uses. Collective while the weight is sharded."""
        weight = self.weight.detach()
        if isinstance(weight, DTensor):
            weight = weight.full_tensor()
        return ternary(weight)

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """Project tokens; differentiable in x, weight, bias and the SubLN gain."""
        dtype = compute_dtype(x)
        if self.subln is not None:
            x = self.subln(x)
        out = self._product(x, dtype)
        return out if self.correction is None else out + self.correction(x.to(dtype))

    def _product(self, x: Tensor, dtype: torch.dtype) -> Tensor:
        """What the ternary layer makes of its (normalised) input."""
        if self.training and self.kept is not None:
            x = sparse(x, self.kept, self.block)
        salient = self.salient if self.training else None
        if self.full_strength and salient is None:
            if self.fp8 is not None and self.training:
                return TernaryFP8.apply(x, self.weight, self.bias, dtype, self.fp8)
            return _Ternary.apply(x, self.weight, self.bias, dtype, self.int8_kernel)
        strength = self.strength.float()
        columns = None if salient is None else strength * ~salient
        return _Blended.apply(x, self.weight, self.bias, strength, columns, dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"


def _master(parameter: Tensor) -> nn.Parameter:
    if isinstance(parameter, nn.Parameter) and parameter.dtype == torch.float32:
        return parameter
    return nn.Parameter(parameter.detach().float(), requires_grad=parameter.requires_grad)


def compute_dtype(x: Tensor) -> torch.dtype:
    """What a matrix product of x runs in: the dtype of autocast where it is on, else that of x."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def bit_linears(module: nn.Module) -> list[BitLinear]:
    """Every BitLinear below `module`, in module order."""
    return [layer for layer in module.modules() if isinstance(layer, BitLinear)]


def set_strength(module: nn.Module, strength: float) -> None:
    """Set the quantisation strength, in [0, 1], of every BitLinear below `module`."""
    if not 0.0 <= strength <= 1.0:
        raise UserError(f"strength: {strength} is not between 0 and 1")
    for layer in bit_linears(module):
        layer.strength.fill_(strength)
        layer.full_strength = strength == 1.0


def strength_of(module: nn.Module) -> float:
    """The strength that the BitLinears below `module` share; 1 where there is none."""
    found = {float(layer.strength) for layer in bit_linears(module)}
    assert len(found) <= 1, f"layers differ in strength: {sorted(found)}"
    return found.pop() if found else 1.0


# --------------------------------------------------------------------------------------- kernels


class _Ternary(torch.autograd.Function):
    """Strength 1: the product of integer codes, scaled once. Saves the int8 codes of x."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        dtype: torch.dtype,
        int8_kernel: bool,
    ) -> Tensor:
        codes, scale = int8_per_token(x)
        weight_scale = ternary_scale(weight)
        ctx.save_for_backward(codes, scale, weight, weight_scale)
        ctx.dtype, ctx.input_dtype = dtype, x.dtype
        signs = ternary_codes(weight, weight_scale)
        return ternary_product(codes, scale, signs, weight_scale, bias, dtype, int8_kernel)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        codes, scale, weight, weight_scale = ctx.saved_tensors
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            signs = ternary_codes(weight, weight_scale).to(ctx.dtype)
            grad_x = (grad @ signs).to(ctx.input_dtype) * weight_scale.to(ctx.input_dtype)
        if ctx.needs_input_grad[1]:
            # the token scale goes into the gradient, so that x stays exact integers in bf16 too
            scaled = (grad * scale).to(ctx.dtype)
            grad_weight = _outer(scaled, codes.to(ctx.dtype)).to(weight.dtype)
        return grad_x, grad_weight, _bias_grad(ctx, grad), None, None


class _Blended(torch.autograd.Function):
    """Strength below 1, of x or of some columns of the weight: values between master and code.
    Saves x itself, recomputes the blends. `columns` is None where all have the strength of x: the
    compiler takes no tensor twice."""

    @staticmethod
    def forward(  # noqa: PLR0917 - autograd passes by position
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        strength: Tensor,
        columns: Tensor | None,
        dtype: torch.dtype,
    ) -> Tensor:
        largest, scale = token_range(x), ternary_scale(weight)
        ctx.save_for_backward(x, largest, weight, scale, strength, columns)
        ctx.dtype = dtype
        return F.linear(
            _blend_x(x, largest, strength).to(dtype),
            _blend_weight(weight, scale, strength if columns is None else columns).to(dtype),
            None if bias is None else bias.to(dtype),
        )

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, largest, weight, scale, strength, columns = ctx.saved_tensors
        columns = strength if columns is None else columns
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ _blend_weight(weight, scale, columns).to(ctx.dtype)).to(x.dtype)
        if ctx.needs_input_grad[1]:
            blend = _blend_x(x, largest, strength).to(ctx.dtype)
            grad_weight = _outer(grad, blend).to(weight.dtype)
        return grad_x, grad_weight, _bias_grad(ctx, grad), None, None, None


def _blend_weight(weight: Tensor, scale: Tensor, strength: Tensor) -> Tensor:
    quantised = ternary_codes(weight, scale).mul_(scale)
    return torch.lerp(weight.float(), quantised, strength, out=quantised)


def _blend_x(x: Tensor, largest: Tensor, strength: Tensor) -> Tensor:
    quantised = token_codes(x, largest).mul_(largest / 127)
    return torch.lerp(x.float(), quantised, strength, out=quantised)


def _outer(grad: Tensor, x: Tensor) -> Tensor:
    """`sum_t grad_t x_t^T` over all tokens: [out, in]."""
    return grad.reshape(-1, grad.shape[-1]).t() @ x.reshape(-1, x.shape[-1])


def _bias_grad(ctx: Any, grad: Tensor) -> Tensor | None:
    if not ctx.needs_input_grad[2]:
        return None
    return grad.reshape(-1, grad.shape[-1]).sum(0, dtype=torch.float32)

"""BitLinear for inference alone: int8 codes in place of the fp32 master, nothing to quantise."""

from jaxtyping import Float
from torch import Tensor, nn

from bitray.nn.linear import BitLinear, compute_dtype
from bitray.nn.product import ternary_product
from bitray.nn.quantize import int8_per_token


class FrozenBitLinear(nn.Module):
    """What a BitLinear computes at strength 1, to the bit, in a quarter of the memory."""

    codes: Tensor
    scale: Tensor

    def __init__(self, layer: BitLinear) -> None:
        super().__init__()
        codes, scale = layer.quantized()
        self.register_buffer("codes", codes)
        self.register_buffer("scale", scale)
        self.bias, self.subln = layer.bias, layer.subln

    def forward(self, x: Float[Tensor, "*tokens in"]) -> Float[Tensor, "*tokens out"]:
        """Project tokens; without gradients."""
        dtype = compute_dtype(x)
        if self.subln is not None:
            x = self.subln(x)
        codes, scale = int8_per_token(x)
        return ternary_product(codes, scale, self.codes, self.scale, self.bias, dtype)


def freeze(model: nn.Module) -> None:
    """Replace every BitLinear, in place, and with it the master weights.

    A layer with more than its SubLN in it stays what it is.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is BitLinear and dict(layer.named_children()).keys() <= {"subln"}:
            model.set_submodule(name, FrozenBitLinear(layer))

"""What an export is measured against: the same codes with floating-point activations."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from bitray.nn import BitLinear


def dequantized(model: PreTrainedModel) -> PreTrainedModel:
    """A copy in which every BitLinear is a plain linear layer of `codes * scale`, after its SubLN.

    It differs from the model by the rounding of activations alone, and engines that keep
    activations in floating point must reproduce it.
    """
    dense = copy.deepcopy(model)
    for name, module in list(dense.named_modules()):
        if isinstance(module, BitLinear):
            linear = _linear(module)
            norm = module.subln
            dense.set_submodule(name, linear if norm is None else nn.Sequential(norm, linear))
    return dense.eval()


def _linear(layer: BitLinear) -> nn.Linear:
    codes, scale = layer.quantized()
    with torch.device("meta"):
        linear = nn.Linear(layer.in_features, layer.out_features, layer.bias is not None)
    linear.weight = nn.Parameter(codes.float() * scale, requires_grad=False)
    if layer.bias is not None:
        linear.bias = nn.Parameter(layer.bias.detach(), requires_grad=False)
    return linear

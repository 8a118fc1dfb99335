"""Aids of training besides strength: salient columns that stay unquantised, sparse activations.

Both act in training mode alone. Evaluation, generation and exports know neither, for the engines
that run an export quantise every column and keep every activation.
"""

from collections.abc import Callable, Mapping

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float32
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bitray.nn.linear import BitLinear, bit_linears

# ---------------------------------------------------------------------------------------- saliency


def track_columns(module: nn.Module) -> None:
    """Begin a running `max_i |W_ij|` of every input column of every BitLinear, with its present
    value; what is already running goes on. Collective where weights are sharded."""
    layers = [layer for layer in bit_linears(module) if layer.column_range is None]
    for layer, now in zip(layers, _column_ranges(layers), strict=True):
        layer.column_range = now.clone()


@torch.no_grad()
def update_columns(module: nn.Module, decay: float) -> None:
    """`ema = decay * ema + (1 - decay) * max_i |W_ij|`. Collective where weights are sharded."""
    layers = bit_linears(module)
    for layer, now in zip(layers, _column_ranges(layers), strict=True):
        assert layer.column_range is not None, "track_columns comes first"
        layer.column_range.lerp_(now, 1 - decay)


@torch.no_grad()
def _column_ranges(layers: list[BitLinear]) -> list[Float32[Tensor, " in"]]:
    """`max_i |W_ij|` of each layer, alike on all workers, in one reduce."""
    if not layers:
        return []
    found = []
    for layer in layers:
        weight = layer.weight.detach()
        local = weight.to_local() if isinstance(weight, DTensor) else weight
        found.append(local.abs().amax(0) if len(local) else local.new_zeros(layer.in_features))
    ranges = torch.cat(found)
    if isinstance(layers[0].weight, DTensor):
        dist.all_reduce(ranges, dist.ReduceOp.MAX)
    return list(ranges.split([layer.in_features for layer in layers]))


def set_saliency(module: nn.Module, share: float) -> None:
    """Leave the `max(1, floor(share * in))` columns of the largest running range unquantised, of
    equal ones those of lower index; with a share of 0 none."""
    for layer in bit_linears(module):
        count = max(1, int(share * layer.in_features)) if share > 0 else 0
        layer.salient = _largest_columns(layer.column_range, count) if count else None


def _largest_columns(ranges: Tensor | None, count: int) -> Bool[Tensor, " in"]:
    assert ranges is not None, "track_columns comes first"
    order = torch.sort(ranges, descending=True, stable=True).indices
    return torch.zeros_like(ranges, dtype=torch.bool).index_fill_(0, order[:count], True)


def column_ranges(module: nn.Module) -> dict[str, Tensor]:
    """What is running, by the path of the layer: state of a training."""
    found = {}
    for name, layer in module.named_modules():
        if isinstance(layer, BitLinear) and layer.column_range is not None:
            found[name.replace("_checkpoint_wrapped_module.", "")] = layer.column_range
    return found


def load_column_ranges(module: nn.Module, ranges: Mapping[str, Tensor]) -> None:
    """Go on with what `column_ranges` gave."""
    for name, layer in module.named_modules():
        held = ranges.get(name.replace("_checkpoint_wrapped_module.", ""))
        if isinstance(layer, BitLinear) and held is not None:
            layer.column_range = held.to(layer.weight.device)


# ------------------------------------------------------------------------------ sparse activations


def set_sparsity(module: nn.Module, kept: Callable[[int], int], block: int | None = None) -> None:
    """Of every group of activations of a token keep `kept(size)` of the largest magnitude; a group
    is `block` consecutive ones, the last one maybe fewer, or all. Keeping all costs nothing."""
    for layer in bit_linears(module):
        size = block or layer.in_features
        count = kept(size)
        assert 1 <= count <= size
        if count == size:
            layer.kept = None
        elif layer.kept is None:
            layer.kept = torch.tensor(count)
        else:
            layer.kept.fill_(count)
        layer.block = block

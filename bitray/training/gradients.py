"""Gradients of fixed batches, kept where FSDP keeps the parameters, and their inner products.

One all-reduce of `[layers, n, n]` numbers gives exact inner products: no gradient is gathered.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace

import numpy as np
import torch
from jaxtyping import Float64
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bitray.models.batch import IGNORED, Batch
from bitray.models.families import decoder_layers
from bitray.models.losses import LossModel, Term
from bitray.objectives import ContinuePretrain
from bitray.training.loop import Loop
from bitray.training.parallel import all_reduce_sums, synchronize_gradients, world

_CE = ContinuePretrain()
Layers = list[list[nn.Parameter]]


def watched_parameters(model: LossModel, depth: float) -> Layers:
    """Matrices of the decoder layers in the last `depth` of the model, layer by layer, and then the
    final norm; of these those that are trained."""
    layers = list(decoder_layers(model.model))
    first = len(layers) - max(1, round(depth * len(layers)))
    matrices = [[p for p in layer.parameters() if p.ndim == 2] for layer in layers[first:]]
    norm = model.model.base_model.get_submodule("norm")
    trained = [[p for p in part if p.requires_grad] for part in (*matrices, norm.parameters())]
    return [part for part in trained if part]


def gram_matrix(
    loop: Loop, batches: Sequence[Batch], depth: float
) -> Float64[np.ndarray, "layers n n"]:
    """Inner products of the gradients of each batch's mean cross-entropy, layer by layer.

    Every worker calls it with the same batches, at the end of a step. Parameters, gradients (there
    are none), and random generators are as they were before.
    """
    layers = watched_parameters(loop.model, depth)
    with _unchanged(loop.model, loop.device):
        found = [_gradient(loop, layers, batch) for batch in batches]
    gram = torch.zeros(len(layers), len(batches), len(batches), device=loop.device)
    for index in range(len(layers)):
        rows = torch.stack([gradient[index] for gradient in found])
        gram[index] = rows @ rows.t()
    replicas = _replicas(next(loop.model.parameters()))
    return all_reduce_sums(gram).cpu().double().numpy() / replicas


def _replicas(parameter: nn.Parameter) -> int:
    """How many workers hold each part of it."""
    if not isinstance(parameter.data, DTensor):
        return 1
    sizes = zip(parameter.data.device_mesh.shape, parameter.data.placements, strict=True)
    return math.prod(size for size, placement in sizes if placement.is_replicate())


@contextmanager
def _unchanged(model: LossModel, device: torch.device) -> Iterator[None]:
    assert all(p.grad is None for p in model.parameters()), "gradients of a step are still there"
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _gradient(loop: Loop, layers: Layers, batch: Batch) -> list[Tensor]:
    """This worker's shard of the gradient, a vector for each layer."""
    scale = 1 / max(int(_CE.count(batch)), 1)
    parts = _shares(batch, loop.settings.batch_size)
    for index, part in enumerate(parts):
        synchronize_gradients(loop.model, on=index == len(parts) - 1)
        with loop.autocast:
            loss, _ = loop.model(part.to(loop.device), [Term("influence", _CE, scale)])
        loss.backward()
    found = [torch.cat([_local(p) for p in parameters]) for parameters in layers]
    loop.model.zero_grad(set_to_none=True)
    return found


def _local(parameter: nn.Parameter) -> Tensor:
    gradient = parameter.grad
    assert gradient is not None, "a parameter without a gradient has no influence"
    local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
    return local.float().flatten()


def _shares(batch: Batch, micro_batch: int) -> list[Batch]:
    """This worker's rows in micro-batches: as many on every worker, for a forward is a collective;
    who has no row left joins in with nothing to learn from."""
    rank, size = world()
    rows = len(batch.input_ids)
    mine = torch.arange(rank, rank + -(-rows // size) * size, size)
    labels = torch.where((mine < rows)[:, None], batch.labels[mine.clamp(max=rows - 1)], IGNORED)
    chosen = replace(_rows(batch, mine.clamp(max=rows - 1)), labels=labels)
    return [_rows(chosen, part) for part in torch.arange(len(mine)).split(micro_batch)]


def _rows(batch: Batch, numbers: Tensor) -> Batch:
    return Batch(*(getattr(batch, field.name)[numbers] for field in fields(batch)))

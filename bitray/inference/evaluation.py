"""Held-out cross-entropy per domain, the same number on any world size."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FSDPModule

from bitray.models.batch import IGNORED, Batch
from bitray.models.losses import LossModel, Term
from bitray.nn import set_strength, strength_of
from bitray.objectives import ContinuePretrain

_CE = ContinuePretrain()


@contextmanager
def fully_quantised(model: nn.Module) -> Iterator[None]:
    """Evaluation mode at strength 1, and back to what it was."""
    before, training = strength_of(model), model.training
    set_strength(model, 1.0)
    model.eval()
    try:
        yield
    finally:
        model.train(training)
        set_strength(model, before)


def evaluate(
    model: LossModel,
    domains: Mapping[str, Sequence[Batch]],
    device: torch.device,
    autocast: torch.autocast,
) -> dict[str, float]:
    """Mean next-token cross-entropy in nats per domain, at strength 1.

    Every worker calls it with the same domains; batches are dealt to the workers, and sums and
    counts are reduced once, so that all of them return the same numbers.
    """
    rank, size = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    sums = torch.zeros(len(domains), 2, dtype=torch.float64, device=device)
    with fully_quantised(model), torch.no_grad():
        for index, batches in enumerate(domains.values()):
            for first in range(0, len(batches), size):
                # A forward is a collective: the ranks that the last round leaves out join in with
                # nothing to learn from.
                mine = batches[min(first + rank, len(batches) - 1)].to(device)
                if first + rank >= len(batches):
                    mine = _silent(mine)
                with autocast:
                    _, metrics = model(mine, [Term("ce", _CE, 1.0)], [], None)
                sums[index, 0] += metrics["ce/sum"].double()
                sums[index, 1] += _CE.count(mine)
    if isinstance(model, FSDPModule):
        model.reshard()  # without a backward the root would stay gathered
    if dist.is_initialized():
        dist.all_reduce(sums)
    return {name: (s / max(n, 1.0)) for name, (s, n) in zip(domains, sums.tolist(), strict=True)}


def _silent(batch: Batch) -> Batch:
    labels = torch.full_like(batch.labels, IGNORED)
    return Batch(batch.input_ids, labels, batch.position_ids, batch.source_id, batch.real)


def perplexity(loss: float) -> float:
    """`exp` of a cross-entropy in nats; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf

"""Muon: momentum made orthogonal (Jordan et al. 2024; scaled as in Moonlight, arXiv 2502.16982).

Under FSDP2 a matrix is orthogonalised once: its shards are sent to its owner, and the shards of the
result back. Owners share the work by its size.
"""

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

from bitray.optim.base import Beta, MatrixSettings, Mixed, Rate, gradient, local
from bitray.optim.groups import Group

_QUINTIC = (3.4445, -4.7750, 2.0315)
_RMS = 0.2
"""Root mean square of AdamW's usual updates, which those of Muon are scaled to."""


class MuonSettings(MatrixSettings):
    """What Muon and its kin are asked."""

    lr: Rate = 2.4e-3
    """Peak learning rate of the matrices of decoder blocks."""
    momentum: Beta = 0.95
    newton_schulz_steps: int = Field(default=5, ge=1)

    def muon_groups(self, model: nn.Module, name: str) -> list[Group]:
        """Groups of a `MuonOptimizer`."""
        first, *rest = self.groups(model, name, self.lr)
        own = {"momentum": self.momentum, "newton_schulz_steps": self.newton_schulz_steps}
        return [first | own, *rest]

    def matrix_bytes(self, rows: int, columns: int) -> float:
        return 4.0 * rows * columns


class Muon(MuonSettings):
    """Nesterov momentum, orthogonalised by Newton-Schulz, for the matrices of decoder blocks."""

    type: Literal["muon"] = "muon"

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model's trainable parameters, after they have been sharded."""
        return MuonOptimizer(self.muon_groups(model, self.type))


class MuonOptimizer(Mixed):
    """Muon on the first group, AdamW on the others."""

    def update(self, group: Group, params: list[nn.Parameter]) -> None:
        updates = [self._nesterov(p, group["momentum"]) for p in params]
        updates = orthogonalize(params, updates, group["newton_schulz_steps"])
        for parameter, update in zip(params, updates, strict=True):
            scale = _RMS * math.sqrt(max(parameter.shape))
            weight = local(parameter)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * scale)

    def _nesterov(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """This worker's shard of the direction before it is orthogonalised."""
        state = self.state[parameter]
        if not state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        buffer, grad = local(state["momentum_buffer"]), local(gradient(parameter))
        buffer.lerp_(grad, 1 - momentum)
        return grad.lerp(buffer, momentum)


def newton_schulz(matrix: Float[Tensor, "m n"], steps: int) -> Float[Tensor, "m n"]:
    """About `U V^T` of the singular value decomposition: singular values end in [0.7, 1.2]."""
    a, b, c = _QUINTIC
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def orthogonalize(
    params: Sequence[nn.Parameter], updates: Sequence[Tensor], steps: int
) -> list[Tensor]:
    """Shards of the orthogonalised updates. bf16 on GPUs, whose errors Newton-Schulz forgives."""
    dtype = torch.bfloat16 if updates[0].device.type == "cuda" else torch.float32
    if not isinstance(params[0], DTensor):
        return [newton_schulz(u.to(dtype), steps).to(u.dtype) for u in updates]
    plan = Plan.of(params)
    sent = torch.cat([updates[i].to(dtype).flatten() for i in plan.order])
    held = plan.exchange(sent, *plan.splits())
    made = _on_owner(plan, held, steps)
    back = plan.exchange(made, *reversed(plan.splits()))
    pieces = back.split([updates[i].numel() for i in plan.order])
    found = dict(zip(plan.order, pieces, strict=True))
    return [found[i].view_as(u).to(u.dtype) for i, u in enumerate(updates)]


def _on_owner(plan: "Plan", held: Tensor, steps: int) -> Tensor:
    """Orthogonalise the matrices that this worker owns, laid out by sender, then by matrix."""
    senders = list(held.split(plan.splits()[0]))
    pieces = [list(one.split(plan.sizes(rank))) for rank, one in enumerate(senders)]
    for at, index in enumerate(plan.owned(plan.rank)):
        width = plan.shapes[index][1]
        whole = torch.cat([one[at] for one in pieces]).view(-1, width)
        parts = newton_schulz(whole, steps).split([len(one[at]) // width for one in pieces])
        for one, part in zip(pieces, parts, strict=True):
            one[at] = part.flatten()
    return torch.cat([piece for one in pieces for piece in one] or [held])


class Plan(NamedTuple):
    """Who orthogonalises what, of matrices sharded by rows over one axis of workers."""

    group: dist.ProcessGroup
    rank: int
    world: int
    shapes: list[tuple[int, int]]
    owners: list[int]
    order: list[int]
    """Matrices by owner: the order in which shards are sent."""

    @classmethod
    def of(cls, params: Sequence[nn.Parameter]) -> "Plan":
        first = params[0].data
        assert isinstance(first, DTensor) and first.device_mesh.ndim == 1
        assert all(isinstance(p, DTensor) and p.placements == (Shard(0),) for p in params)
        world = first.device_mesh.size()
        shapes = [(p.shape[0], p.shape[1]) for p in params]
        owners = spread([m * n * min(m, n) for m, n in shapes], world)
        order = sorted(range(len(params)), key=lambda i: owners[i])
        mesh = first.device_mesh
        return cls(mesh.get_group(), mesh.get_local_rank(), world, shapes, owners, order)

    def owned(self, rank: int) -> list[int]:
        """Matrices of an owner."""
        return [i for i in self.order if self.owners[i] == rank]

    def shard(self, index: int, rank: int) -> int:
        """Elements of a matrix that lie on a worker; FSDP cuts as `torch.chunk` does."""
        rows, width = self.shapes[index]
        chunk = -(-rows // self.world)
        return max(0, min(chunk, rows - rank * chunk)) * width

    def sizes(self, rank: int) -> list[int]:
        """Elements that this owner gets from a worker, by matrix."""
        return [self.shard(i, rank) for i in self.owned(self.rank)]

    def splits(self) -> tuple[list[int], list[int]]:
        """Elements received and sent on the way to the owners, by worker."""
        received = [sum(self.sizes(rank)) for rank in range(self.world)]
        sent = [
            sum(self.shard(i, self.rank) for i in self.owned(rank)) for rank in range(self.world)
        ]
        return received, sent

    def exchange(self, sent: Tensor, received: list[int], splits: list[int]) -> Tensor:
        """One all-to-all of all matrices."""
        out = sent.new_empty(sum(received))
        dist.all_to_all_single(out, sent, received, splits, group=self.group)
        return out


def spread(costs: Sequence[int], workers: int) -> list[int]:
    """An owner for each cost: the largest first, each to whoever has the least so far."""
    loads, owners = [0] * workers, [0] * len(costs)
    for index in sorted(range(len(costs)), key=lambda i: -costs[i]):
        owners[index] = loads.index(min(loads))
        loads[owners[index]] += costs[index]
    return owners

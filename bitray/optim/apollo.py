"""APOLLO (Zhu et al., arXiv 2412.05270): AdamW's scaling of gradients, learnt in few dimensions.

The gradient of a matrix is projected at random along its smaller dimension; Adam's moments of the
projection say by how much each channel (row or column of the larger dimension) is scaled. Seeds of
the projections are functions of the step, so nothing of them is kept. Under FSDP2 moments are
sharded by channels; three sums over workers a step serve all matrices.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.distributed as dist
from jaxtyping import Float
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from bitray.optim.base import MatrixSettings, Mixed, Rate, gradient, local
from bitray.optim.groups import Group

TINY = 1e-8


class ApolloSettings(MatrixSettings):
    """What APOLLO and its kin are asked."""

    lr: Rate = 3e-4
    """Peak learning rate of the matrices of decoder blocks."""
    refresh_every: int = Field(default=200, ge=1)
    """Steps that a projection serves."""
    growth_limit: float = Field(default=1.01, gt=1)
    """The norm of an update is at most this multiple of the one before it."""
    seed: int = Field(default=0, ge=0)

    def apollo_groups(self, model: nn.Module, name: str, rank: int, scale: float) -> list[Group]:
        """Groups of an `ApolloOptimizer`."""
        first, *rest = self.groups(model, name, self.lr)
        kept = self.model_dump(include={"betas", "eps", "refresh_every", "growth_limit", "seed"})
        return [first | kept | {"rank": rank, "scale": scale}, *rest]


class Apollo(ApolloSettings):
    """APOLLO of rank r: every channel has a scale of its own."""

    type: Literal["apollo"] = "apollo"
    rank: int = Field(default=256, ge=1)
    """Dimensions of the projection; the paper's is a quarter of the model's width."""
    scale: float = Field(default=1.0, gt=0)

    def matrix_bytes(self, rows: int, columns: int) -> float:
        return 8.0 * max(rows, columns) * min(self.rank, rows, columns)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model's trainable parameters, after they have been sharded."""
        return ApolloOptimizer(self.apollo_groups(model, self.type, self.rank, self.scale))


class ApolloOptimizer(Mixed):
    """APOLLO on the first group, AdamW on the others."""

    def update(self, group: Group, params: list[nn.Parameter]) -> None:
        everything = {id(p): index for index, p in enumerate(group["params"])}
        projected = self._project(group, params, [everything[id(p)] for p in params])
        adapted = [self._adapt(p, low, group) for p, low in zip(params, projected, strict=True)]
        factors = self.factors(params, projected, adapted)
        updates = [local(gradient(p)) * f for p, f in zip(params, factors, strict=True)]
        self._limit_growth(params, updates, group["growth_limit"])
        for parameter, update in zip(params, updates, strict=True):
            weight = local(parameter)
            weight.mul_(1 - group["lr"] * group["weight_decay"])
            weight.add_(update, alpha=-group["lr"] * group["scale"])

    def _project(
        self, group: Group, params: Sequence[nn.Parameter], places: Sequence[int]
    ) -> list[Tensor]:
        """This worker's channels of every projected gradient: [channels, rank]."""
        for parameter in params:
            state = self.state[parameter]
            if not state:
                rank = min(group["rank"], *parameter.shape)
                state["step"] = torch.zeros(())
                state["exp_avg"] = _by_channel(parameter, rank)
                state["exp_avg_sq"] = _by_channel(parameter, rank)
                state["norm"] = torch.zeros((), device=parameter.device)
        projected = []
        for parameter, place in zip(params, places, strict=True):
            state = self.state[parameter]
            epoch = int(state["step"]) // group["refresh_every"]
            matrix = projection(
                min(parameter.shape),
                state["exp_avg"].shape[1],
                seed=(group["seed"] * 1_000_003 + epoch) * 1_000_003 + place,
                device=parameter.device,
            )
            grad = local(gradient(parameter))
            wide = _is_wide(parameter)
            projected.append(grad.T @ matrix[_rows(parameter)] if wide else grad @ matrix)
        # rows of wide matrices are what was summed over, and those are spread over workers
        partial = [low for p, low in zip(params, projected, strict=True) if _is_wide(p)]
        sum_over_workers(params, partial)
        return [
            low[_rows(self.state[p]["exp_avg"])] if _is_wide(p) else low
            for p, low in zip(params, projected, strict=True)
        ]

    def _adapt(self, parameter: nn.Parameter, low: Tensor, group: Group) -> Tensor:
        """What Adam makes of a projected gradient."""
        state, (beta1, beta2) = self.state[parameter], group["betas"]
        state["step"] += 1
        step = int(state["step"])
        mean = local(state["exp_avg"]).lerp_(low, 1 - beta1)
        square = local(state["exp_avg_sq"]).mul_(beta2).addcmul_(low, low, value=1 - beta2)
        return mean / (1 - beta1**step) / ((square / (1 - beta2**step)).sqrt() + group["eps"])

    def factors(
        self, params: Sequence[nn.Parameter], before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> list[Tensor]:
        """What this worker's gradients are multiplied by: a number for each channel."""
        ratios = [
            a.norm(dim=1) / (b.norm(dim=1) + TINY) for b, a in zip(before, after, strict=True)
        ]
        whole = []
        for parameter, ratio in zip(params, ratios, strict=True):
            if _is_wide(parameter):  # each worker needs all channels for its rows
                full = ratio.new_zeros(parameter.shape[1])
                full[_rows(self.state[parameter]["exp_avg"])] = ratio
                whole.append(full)
        sum_over_workers(params, whole)
        columns = iter(whole)
        return [
            next(columns) if _is_wide(p) else ratio[:, None]
            for p, ratio in zip(params, ratios, strict=True)
        ]

    def _limit_growth(
        self, params: Sequence[nn.Parameter], updates: Sequence[Tensor], limit: float
    ) -> None:
        """Scale down, in place, what is longer than `limit` times the update before it."""
        squares = [update.square().sum() for update in updates]
        sum_over_workers(params, squares)
        for parameter, update, square in zip(params, updates, squares, strict=True):
            state, norm = self.state[parameter], square.sqrt()
            most = torch.where(state["norm"] > 0, limit * state["norm"], torch.inf)
            update.mul_((most / (norm + TINY)).clamp(max=1.0))
            state["norm"] = torch.minimum(norm, most)


def projection(size: int, rank: int, seed: int, device: torch.device) -> Float[Tensor, "size rank"]:
    """Gaussian, of variance 1 / rank, so that it keeps lengths in the mean."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(size, rank, generator=generator, device=device) / rank**0.5


def _is_wide(parameter: Tensor) -> bool:
    """Whether channels are columns: they are of the larger dimension."""
    return parameter.shape[0] <= parameter.shape[1]


def _by_channel(parameter: nn.Parameter, rank: int) -> Tensor:
    """Zeros of shape [channels, rank], their channels spread over the workers of the parameter."""
    channels = max(parameter.shape)
    if not isinstance(parameter.data, DTensor):
        return parameter.new_zeros(channels, rank)
    assert parameter.device_mesh.ndim == 1 and parameter.placements == (Shard(0),)  # type: ignore[attr-defined]
    mesh: DeviceMesh = parameter.device_mesh  # type: ignore[attr-defined]
    return torch.distributed.tensor.zeros(
        channels, rank, dtype=parameter.dtype, device_mesh=mesh, placements=[Shard(0)]
    )


def _rows(tensor: Tensor) -> slice:
    """The rows of a tensor that lie on this worker; FSDP cuts as `torch.chunk` does."""
    if not isinstance(tensor, DTensor):
        return slice(None)
    chunk = -(-tensor.shape[0] // tensor.device_mesh.size())
    start = min(chunk * tensor.device_mesh.get_local_rank(), tensor.shape[0])
    return slice(start, start + tensor.to_local().shape[0])


def sum_over_workers(params: Sequence[Tensor], parts: Sequence[Tensor]) -> None:
    """Replace each part by its sum over the workers that share the parameters; one all-reduce."""
    if not parts or not isinstance(params[0], DTensor):
        return
    flat = torch.cat([part.flatten() for part in parts])
    dist.all_reduce(flat, group=params[0].device_mesh.get_group())
    for part, total in zip(parts, flat.split([part.numel() for part in parts]), strict=True):
        part.copy_(total.view_as(part))

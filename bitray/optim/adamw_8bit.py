"""AdamW with moments of 8 bits, in blocks of 256 (Dettmers et al., arXiv 2110.02861), by
bitsandbytes, which knows no DTensors: it works on each worker's shard. Blocks are those of the
whole tensor. One that a border of shards cuts is worked on by all who have a part of it, with the
gradients of all of it: moments depend on gradients alone, so all of them come to the same codes.

A checkpoint holds the moments in fp32, as AdamW's does, so that any number of workers can take them
over; the codes that they came from are found again bit by bit where shards are the same.
"""

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from jaxtyping import Float, Float32, UInt8
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard
from torch.nn import functional as F

from bitray.optim.base import OptimizerSettings, Rate, adamw_update, gradient, local
from bitray.optim.groups import Group

BLOCK = 256
_MOMENTS = ("exp_avg", "exp_avg_sq")


class AdamW8bit(OptimizerSettings):
    """AdamW with two bytes of state for a parameter instead of eight."""

    type: Literal["adamw_8bit"] = "adamw_8bit"
    lr: Rate = 3e-4
    """Peak learning rate."""
    min_8bit_size: int = Field(default=4096, ge=1)
    """Whole tensors of fewer elements keep moments of 32 bits, however they are sharded."""

    def state_bytes(self, model: nn.Module) -> float:
        trained = (p.numel() for p in model.parameters() if p.requires_grad)
        large = sum(count for count in trained if count >= self.min_8bit_size)
        return super().state_bytes(model) - (6 - 8 / BLOCK) * large

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model's trainable parameters, after they have been sharded."""
        groups = self.adamw_groups(model, self.lr)
        return AdamW8bitOptimizer([group | {"fused": True} for group in groups], self.min_8bit_size)


class AdamW8bitOptimizer(torch.optim.Optimizer):
    """State as AdamW's, but of large tensors the moments are codes of this worker's shard."""

    def __init__(self, groups: list[Group], min_8bit_size: int) -> None:
        from bitsandbytes.functional import create_dynamic_map

        super().__init__(groups, {})
        self.min_8bit_size = min_8bit_size
        device = groups[0]["params"][0].device
        self.books = [create_dynamic_map(signed=signed).to(device) for signed in (True, False)]
        """What the codes of either moment stand for, as shares of the largest in a block."""
        self.largest: dict[nn.Parameter, list[Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; nothing is exchanged between workers."""
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            small = [p for p in params if not self._is_large(p)]
            if small:
                adamw_update(group, small, [self.state[p] for p in small])
            large = [p for p in params if self._is_large(p)]
            gradients = whole_blocks(large, [local(gradient(p)).flatten() for p in large])
            for parameter, values in zip(large, gradients, strict=True):
                self._step_in_codes(group, parameter, values)

    def state_dict(self) -> dict[str, Any]:
        """As that of AdamW, in fp32."""
        packed = super().state_dict()
        params: list[nn.Parameter] = [p for group in self.param_groups for p in group["params"]]
        for index, state in packed["state"].items():
            if self._is_large(params[index]):
                packed["state"][index] = state | self._moments(params[index])
        return packed

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over moments in fp32."""
        super().load_state_dict(state_dict)
        large = [p for group in self.param_groups for p in group["params"] if p in self.state]
        large = [parameter for parameter in large if self._is_large(parameter)]
        steps = {parameter: self.state[parameter]["step"].cpu() for parameter in large}
        for parameter in large:
            self.largest[parameter] = []
        for name, book in zip(_MOMENTS, self.books, strict=True):
            moments = [local(self.state[parameter][name]).flatten() for parameter in large]
            for parameter, values in zip(large, whole_blocks(large, moments), strict=True):
                codes, largest = quantized(values, book)
                self.state[parameter] |= {"step": steps[parameter], name: codes}
                self.largest[parameter].append(largest)

    def _is_large(self, parameter: Tensor) -> bool:
        return parameter.numel() >= self.min_8bit_size  # of a DTensor: of all workers

    def _step_in_codes(self, group: Group, parameter: nn.Parameter, gradients: Tensor) -> None:
        """A step with the gradients of all blocks of which this worker has a part."""
        from bitsandbytes.functional import optimizer_update_8bit_blockwise

        state, own = self.state[parameter], local(parameter).view(-1)
        if not state:
            zeros = [quantized(torch.zeros_like(gradients), book) for book in self.books]
            state["step"] = torch.zeros(())
            for name, (codes, _) in zip(_MOMENTS, zeros, strict=True):
                state[name] = codes
            self.largest[parameter] = [largest for _, largest in zeros]
        state["step"] += 1
        if not own.numel():
            return
        weight, before = own, _cuts(parameter)[0] % BLOCK
        if len(gradients) > len(own):  # what is not ours has no weight here, only moments
            weight = torch.zeros_like(gradients)
            weight[before : before + len(own)] = own
        (beta1, beta2), (first, second) = group["betas"], self.largest[parameter]
        optimizer_update_8bit_blockwise(
            "adam",
            gradients,
            weight,
            state["exp_avg"],
            state["exp_avg_sq"],
            beta1,
            beta2,
            0.0,  # beta3 and alpha are those of other optimizers
            0.0,
            group["eps"],
            int(state["step"]),
            group["lr"],
            self.books[0],
            self.books[1],
            first,
            second,
            weight_decay=group["weight_decay"],
        )
        if weight is not own:
            own.copy_(weight[before : before + len(own)])

    def _moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Moments in fp32, sharded as the parameter is."""
        found = {}
        for name, book, largest in zip(_MOMENTS, self.books, self.largest[parameter], strict=True):
            own, before = local(parameter), _cuts(parameter)[0] % BLOCK
            values = dequantized(self.state[parameter][name].flatten(), book, largest)
            values = values[before : before + own.numel()].view(own.shape)
            if isinstance(parameter.data, DTensor):
                values = DTensor.from_local(
                    values,
                    parameter.device_mesh,  # type: ignore[attr-defined]
                    parameter.placements,  # type: ignore[attr-defined]
                    shape=parameter.shape,
                    stride=parameter.stride(),
                )
            found[name] = values
        return found


def _cuts(parameter: Tensor) -> tuple[int, int, list[int]]:
    """Where this worker's shard begins and ends in the flattened tensor, and the borders between
    shards; FSDP cuts as `torch.chunk` does."""
    if not isinstance(parameter.data, DTensor):
        return 0, parameter.numel(), []
    mesh: DeviceMesh = parameter.device_mesh  # type: ignore[attr-defined]
    assert mesh.ndim == 1 and parameter.placements == (Shard(0),)  # type: ignore[attr-defined]
    rows, rank = parameter.shape[0], mesh.get_local_rank()
    chunk, width = -(-rows // mesh.size()), parameter.numel() // rows
    cuts = [min(shard * chunk, rows) * width for shard in range(mesh.size() + 1)]
    return cuts[rank], cuts[rank + 1], cuts[1:-1]


def whole_blocks(params: Sequence[nn.Parameter], values: list[Tensor]) -> list[Tensor]:
    """This worker's flat shards of some values of the parameters, each extended to whole blocks by
    what others have of its first and its last one. One all-reduce, of these blocks."""
    cuts = [_cuts(parameter) for parameter in params]
    places = [
        (index, border // BLOCK)
        for index, (_, _, borders) in enumerate(cuts)
        for border in borders
        if border % BLOCK and border < params[index].numel()
    ]
    rows = {place: row for row, place in enumerate(dict.fromkeys(places))}
    if not rows:
        return [value.contiguous() for value in values]
    table = values[0].new_zeros(len(rows), BLOCK)
    for (index, block), row in rows.items():
        start, stop, _ = cuts[index]
        low, high = max(start, block * BLOCK), min(stop, (block + 1) * BLOCK)
        if low < high:
            at = low - block * BLOCK
            table[row, at : at + high - low] = values[index][low - start : high - start]
    mesh: DeviceMesh = params[0].device_mesh  # type: ignore[attr-defined]
    dist.all_reduce(table, group=mesh.get_group())
    found = []
    for index, (value, (start, stop, _)) in enumerate(zip(values, cuts, strict=True)):
        parts = [value]
        if start < stop and start % BLOCK:
            parts.insert(0, table[rows[index, start // BLOCK], : start % BLOCK])
        if start < stop < params[index].numel() and stop % BLOCK:
            end = min(BLOCK, params[index].numel() - stop // BLOCK * BLOCK)
            parts.append(table[rows[index, stop // BLOCK], stop % BLOCK : end])
        found.append(torch.cat(parts))
    return found


def dequantized(
    codes: UInt8[Tensor, " n"], book: Float32[Tensor, "256"], largest: Float32[Tensor, " blocks"]
) -> Float32[Tensor, " n"]:
    """What codes stand for."""
    return book[codes.int()] * largest.repeat_interleave(BLOCK)[: len(codes)]


def quantized(
    values: Float[Tensor, " n"], book: Float32[Tensor, "256"]
) -> tuple[UInt8[Tensor, " n"], Float32[Tensor, " blocks"]]:
    """Codes and the largest magnitude of each block; of `dequantized` values those they came from.

    The book has a 1 but no -1, so a block whose largest is negative shows only book[0] times it;
    dividing by that may miss the last bit, and its neighbours are tried, too.
    """
    count = -(-len(values) // BLOCK)
    blocks = F.pad(values.float(), (0, count * BLOCK - len(values))).view(count, BLOCK)
    if not count:
        return values.new_zeros(0, dtype=torch.uint8), values.new_zeros(0, dtype=torch.float32)
    above, below = blocks.amax(1), -blocks.amin(1)
    guess = torch.where((below >= above) & (below > 0), below / -book[0], above)
    nearest = (book[1:] + book[:-1]) / 2
    best = guess
    for target in (torch.inf, -torch.inf):
        near = torch.nextafter(guess, torch.full_like(guess, target))
        back = _round_trip(blocks, near, book, nearest)
        best = torch.where((back == blocks).all(1), near, best)
    exact = (_round_trip(blocks, guess, book, nearest) == blocks).all(1)
    best = torch.where(exact, guess, best)
    return _codes(blocks, best, nearest).flatten()[: len(values)].to(torch.uint8), best


def _codes(blocks: Tensor, largest: Tensor, nearest: Tensor) -> Tensor:
    shares = blocks / largest.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    return torch.bucketize(shares, nearest)


def _round_trip(blocks: Tensor, largest: Tensor, book: Tensor, nearest: Tensor) -> Tensor:
    return book[_codes(blocks, largest, nearest)] * largest[:, None]

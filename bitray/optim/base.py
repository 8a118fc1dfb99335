"""What optimizers share: settings, and two rules in one optimizer, one of them AdamW."""

from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from bitray.optim.groups import Group, block_matrices, param_groups
from bitray.settings import Settings

Beta = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class OptimizerSettings(Settings):
    """What every optimizer is asked."""

    betas: tuple[Beta, Beta] = (0.9, 0.95)
    eps: float = Field(default=1e-8, gt=0)
    weight_decay: float = Field(default=0.01, ge=0)
    """Of matrices; norms and biases never decay."""
    enable_clipping: bool = True
    """Clip the global gradient norm; False only measures it."""

    def adamw_groups(
        self, model: nn.Module, lr: float, besides: list[nn.Parameter] | None = None
    ) -> list[Group]:
        """Groups for AdamW of all parameters of a model but those `besides`."""
        groups = param_groups(model, self.weight_decay, besides or [])
        for group in groups:
            group |= {"lr": lr, "peak_lr": lr, "betas": self.betas, "eps": self.eps}
        return groups


class MatrixSettings(OptimizerSettings):
    """Of optimizers with a rule for the matrices of decoder blocks."""

    adamw_lr: Rate = 3e-4
    """Peak learning rate of AdamW, which takes the rest: embeddings, head, norms, biases."""

    def groups(self, model: nn.Module, name: str, lr: float) -> list[Group]:
        """The matrices of the decoder blocks, then what is left to AdamW."""
        matrices = block_matrices(model, name)
        first = {"name": name, "params": matrices, "weight_decay": self.weight_decay}
        rest = self.adamw_groups(model, self.adamw_lr, besides=matrices)
        # `fused` tells torch that the counters of steps live where the parameters do
        return [first | {"lr": lr, "peak_lr": lr}, *(group | {"fused": True} for group in rest)]


class Mixed(torch.optim.Optimizer):
    """The first group follows `update`, all others AdamW."""

    def __init__(self, groups: list[Group]) -> None:
        super().__init__(groups, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; collective where parameters are sharded."""
        for index, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            if index:
                adamw_update(group, params, [self.state[p] for p in params])
            else:
                self.update(group, params)

    def update(self, group: Group, params: list[nn.Parameter]) -> None:
        """A step of the matrices, all of which have a gradient."""
        raise NotImplementedError


@runtime_checkable
class Reports(Protocol):
    """An optimizer that has something to log."""

    def report(self) -> dict[str, float]:
        """Metrics of the last step, alike on all workers."""
        ...


def adamw_update(group: Group, params: list[nn.Parameter], states: list[dict[str, Any]]) -> None:
    """A step of AdamW on this worker's shards, with the state of `torch.optim.AdamW`."""
    for parameter, state in zip(params, states, strict=True):
        if not state:
            state["step"] = torch.zeros((), device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
    adamw(
        [local(p) for p in params],
        [local(gradient(p)) for p in params],
        [local(state["exp_avg"]) for state in states],
        [local(state["exp_avg_sq"]) for state in states],
        [],
        [state["step"] for state in states],
        fused=True,
        amsgrad=False,
        maximize=False,
        beta1=group["betas"][0],
        beta2=group["betas"][1],
        lr=group["lr"],
        weight_decay=group["weight_decay"],
        eps=group["eps"],
    )


def gradient(parameter: nn.Parameter) -> Tensor:
    """The gradient of a parameter that has one."""
    assert parameter.grad is not None
    return parameter.grad


def local(tensor: Tensor) -> Tensor:
    """This worker's shard of a tensor; of a plain one all of it."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor

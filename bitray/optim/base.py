"""What optimizers share: settings, and two rules in one optimizer, one of them AdamW."""

from typing import Annotated, Any, Protocol, runtime_checkable

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw

from bitray.optim.groups import Group, block_matrices, param_groups
from bitray.schedules import LearningRateSchedule
from bitray.settings import Settings, UserError, nearest

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
    group_lr: dict[str, Rate] = {}
    """Peak learning rates of single groups: `decay` (matrices), `no_decay` (norms, biases), and of
    optimizers with a rule for the matrices of decoder blocks these under the optimizer's type."""
    group_schedule: dict[str, LearningRateSchedule] = {}
    """Schedules of single groups; each is relative to the group's own peak."""

    @model_validator(mode="after")
    def _groups_exist(self) -> "OptimizerSettings":
        for field in ("group_lr", "group_schedule"):
            for name in getattr(self, field):
                if name not in self.group_names():
                    raise ValueError(
                        f"{field}.{name}: there is no such parameter group"
                        f"{nearest(name, self.group_names())}; there are: "
                        f"{', '.join(self.group_names())}"
                    )
        return self

    def group_names(self) -> tuple[str, ...]:
        """Parameter groups that a model may have."""
        return ("decay", "no_decay")

    def adamw_groups(
        self, model: nn.Module, lr: float, besides: list[nn.Parameter] | None = None
    ) -> list[Group]:
        """Groups for AdamW of all parameters of a model but those `besides`."""
        groups = param_groups(model, self.weight_decay, besides or [])
        for group in groups:
            group.update(betas=self.betas, eps=self.eps, **self.rate(group["name"], lr))
        return groups

    def rate(self, name: str, lr: float) -> Group:
        """Peak and present learning rate of a group whose peak is `lr` if nothing else is said."""
        peak = self.group_lr.get(name, lr)
        return {"lr": peak, "peak_lr": peak}

    def state_bytes(self, model: nn.Module) -> float:
        """Bytes of state of all workers together; `model` need not have weights."""
        return 8.0 * sum(p.numel() for p in model.parameters() if p.requires_grad)


class MatrixSettings(OptimizerSettings):
    """Of optimizers with a rule for the matrices of decoder blocks."""

    type: str
    adamw_lr: Rate = 3e-4
    """Peak learning rate of AdamW, which takes the rest: embeddings, head, norms, biases."""

    def groups(self, model: nn.Module, name: str, lr: float) -> list[Group]:
        """The matrices of the decoder blocks, then what is left to AdamW."""
        matrices = block_matrices(model, name)
        first = {"name": name, "params": matrices, "weight_decay": self.weight_decay}
        rest = self.adamw_groups(model, self.adamw_lr, besides=matrices)
        # `fused` tells torch that the counters of steps live where the parameters do
        return [first | self.rate(name, lr), *(group | {"fused": True} for group in rest)]

    def group_names(self) -> tuple[str, ...]:
        return (self.type, *super().group_names())

    def state_bytes(self, model: nn.Module) -> float:
        matrices = block_matrices(model, self.type)
        rest = super().state_bytes(model) - 8.0 * sum(p.numel() for p in matrices)
        return rest + sum(self.matrix_bytes(p.shape[0], p.shape[1]) for p in matrices)

    def matrix_bytes(self, rows: int, columns: int) -> float:
        """Bytes of state of a matrix of a decoder block."""
        raise NotImplementedError


class Mixed(torch.optim.Optimizer):
    """The first group follows `update`, all others AdamW."""

    def __init__(self, groups: list[Group]) -> None:
        for parameter in groups[0]["params"]:
            if parameter.ndim != 2:
                raise UserError(
                    f"'{groups[0]['name']}' works on matrices, and was given a parameter of shape "
                    f"{tuple(parameter.shape)}; leave that to AdamW"
                )
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

"""Which parameter is treated how, and setting the learning rate of each group."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from bitray.settings import UserError

Group = dict[str, Any]


def param_groups(
    model: nn.Module, weight_decay: float, besides: Sequence[nn.Parameter] = ()
) -> list[Group]:
    """Groups `decay` (matrices, embeddings and head among them) and `no_decay` (norms, biases,
    everything of one dimension). Every trainable parameter is in exactly one of them or among
    those `besides`, tied ones once."""
    taken = {id(parameter) for parameter in besides}
    rest = [parameter for _, parameter in _trainable(model) if id(parameter) not in taken]
    groups: list[Group] = [
        {
            "name": "decay",
            "params": [p for p in rest if p.ndim >= 2],
            "weight_decay": weight_decay,
        },
        {"name": "no_decay", "params": [p for p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    assert_partition(model, [{"params": [*besides]}, *groups])
    return groups


def block_matrices(model: nn.Module, optimizer: str) -> list[nn.Parameter]:
    """The trainable 2-D weights inside of decoder blocks, which are what an `nn.ModuleList` holds;
    embeddings and head are outside of it. `UserError` if there is none."""
    blocks = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    inside = {id(parameter) for module in blocks for parameter in module.parameters()}
    found = [p for _, p in _trainable(model) if p.ndim == 2 and id(p) in inside]
    if not found:
        raise UserError(
            f"training.optimizer.type: '{optimizer}' is for the matrices of decoder blocks, and "
            "this model has none that can be trained; use 'adamw'"
        )
    return found


def assert_partition(model: nn.Module, groups: list[Group]) -> None:
    """Every trainable parameter is in exactly one group, and nothing else is in any."""
    names = {id(parameter): name for name, parameter in _trainable(model)}
    grouped = [names.get(id(p), "not a trainable parameter") for g in groups for p in g["params"]]
    missed = sorted(set(names.values()) - set(grouped))
    twice = sorted({name for name in grouped if grouped.count(name) > 1})
    strangers = len([name for name in grouped if name not in names.values()])
    assert not missed, f"in no parameter group: {missed}"
    assert not twice, f"in more than one parameter group: {twice}"
    assert not strangers, (
        f"{strangers} parameters of the groups are not trainable ones of the model"
    )


def set_learning_rates(
    optimizer: torch.optim.Optimizer, factor: float, by_group: Mapping[str, float] | None = None
) -> None:
    """Every group's learning rate as `factor`, or one of its own, times its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * (by_group or {}).get(group["name"], factor)


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters; of tied ones (one object under two names) the first name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

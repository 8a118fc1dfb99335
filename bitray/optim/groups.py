"""Which parameter is treated how, and setting the learning rate of each group."""

from typing import Any

import torch
from torch import nn

Group = dict[str, Any]


def param_groups(model: nn.Module, weight_decay: float) -> list[Group]:
    """Groups `decay` (matrices, embeddings and head among them) and `no_decay` (norms, biases,
    everything of one dimension). Every trainable parameter is in exactly one, tied ones once."""
    matrices: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for _, parameter in _trainable(model):
        (matrices if parameter.ndim >= 2 else others).append(parameter)
    groups: list[Group] = [
        {"name": "decay", "params": matrices, "weight_decay": weight_decay},
        {"name": "no_decay", "params": others, "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    assert_partition(model, groups)
    return groups


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


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Every group's learning rate as `factor` times its own peak."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * factor


def _trainable(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Names and parameters; of tied ones (one object under two names) the first name."""
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]

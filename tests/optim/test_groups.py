"""Every trainable parameter is in exactly one group, and only matrices decay."""

import pytest
import torch
from torch import nn

from bitray.optim import AdamW, assert_partition, param_groups, set_learning_rates


class Tied(nn.Module):
    """Embedding tied to the head, a norm, a projection with bias, and something frozen."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.project = nn.Linear(4, 4)
        self.norm = nn.RMSNorm(4)
        self.scale = nn.Parameter(torch.ones(()))
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def _names(model: nn.Module, group: dict) -> set[str]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(parameter)] for parameter in group["params"]}


def test_matrices_decay_and_nothing_else_does():
    model = Tied()
    decay, rest = param_groups(model, 0.1)
    assert (decay["name"], decay["weight_decay"]) == ("decay", 0.1)
    assert (rest["name"], rest["weight_decay"]) == ("no_decay", 0.0)
    assert _names(model, decay) == {"embed.weight", "project.weight"}  # the head is the embedding
    assert _names(model, rest) == {"project.bias", "norm.weight", "scale"}


def test_a_group_without_parameters_is_left_out():
    assert [g["name"] for g in param_groups(nn.Linear(2, 2, bias=False), 0.1)] == ["decay"]


def test_a_missed_parameter_is_named():
    model = Tied()
    groups = param_groups(model, 0.1)
    groups[0]["params"].pop()
    with pytest.raises(AssertionError, match=r"in no parameter group.*project\.weight"):
        assert_partition(model, groups)


def test_a_parameter_in_two_groups_is_named():
    model = Tied()
    groups = param_groups(model, 0.1)
    groups[1]["params"].append(model.head.weight)
    with pytest.raises(AssertionError, match=r"more than one parameter group.*embed\.weight"):
        assert_partition(model, groups)


def test_a_frozen_parameter_does_not_belong():
    model = Tied()
    groups = param_groups(model, 0.1)
    groups[0]["params"].append(model.frozen.weight)
    with pytest.raises(AssertionError, match="not trainable"):
        assert_partition(model, groups)


def test_learning_rates_follow_each_groups_own_peak():
    optimizer = AdamW(lr=1e-2).build(Tied())
    optimizer.param_groups[1]["peak_lr"] = 4e-2
    for factor in (0.5, 0.25):  # not relative to the rate of the moment
        set_learning_rates(optimizer, factor)
        assert [g["lr"] for g in optimizer.param_groups] == [1e-2 * factor, 4e-2 * factor]

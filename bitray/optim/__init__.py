"""One file per optimizer, parameter groups, clipping. Schedules are in `bitray.schedules`."""

from importlib import import_module
from typing import Any

_HOMES = {
    "AdamW": "adamw",
    "AdamW8bit": "adamw_8bit",
    "Apollo": "apollo",
    "ApolloMini": "apollo_mini",
    "Muon": "muon",
    "MuonClip": "muonclip",
    "Reports": "base",
    "Norms": "zclip",
    "Optimizer": "settings",
    "ZClip": "zclip",
    "assert_partition": "groups",
    "clip_grad_norm": "clipping",
    "param_groups": "groups",
    "set_learning_rates": "groups",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

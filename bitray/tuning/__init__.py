"""Search of hyper-parameters over whole runs, by Ax, beside each other on a Ray cluster."""

from importlib import import_module
from typing import Any

_HOMES = {"AxSearcher": "searcher", "SearchSpace": "space"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

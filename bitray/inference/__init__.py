"""What a model says: held-out losses per domain, and text."""

from importlib import import_module
from typing import Any

_WHERE = {
    "evaluate": "evaluation",
    "perplexity": "evaluation",
    "generate": "generation",
    "Sampling": "settings",
    "Diffusion": "settings",
    "Task": "settings",
    "LMEval": "settings",
}
__all__ = list(_WHERE)


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(name)
    return getattr(import_module(f"{__name__}.{_WHERE[name]}"), name)

"""Exports of ternary models to formats other engines read, each proved by reading it back."""

from importlib import import_module
from typing import Any

_HOME = {
    "write_gguf": "gguf",
    "write_huggingface": "huggingface",
    "can_export": "plan",
    "GGUFType": "packing",
    "GGUF_TYPES": "packing",
    "ModelCard": "card",
    "Report": "report",
    "ExportError": "report",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitray.export' has no attribute '{name}'")
    return getattr(import_module(f"bitray.export.{_HOME[name]}"), name)

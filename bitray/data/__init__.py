"""Data: sources, tokenising, packing, prepared shards, the mixture plan and its streams.

`prepare` is not lifted up here: `bitray.data.prepare` is the module of that name.
"""

from importlib import import_module
from typing import Any

_HOMES = {
    "DataSettings": "settings",
    "Manifest": "manifest",
    "MixtureActor": "actor",
    "MixturePlan": "plan",
    "Packer": "packing",
    "Row": "packing",
    "Shards": "shards",
    "check_vocabulary": "tokenizer",
    "documents": "units",
    "held_out": "shards",
    "pack": "packing",
    "project_to_bounds": "plan",
    "read_manifest": "manifest",
    "tokenizer_identity": "tokenizer",
    "train_tokenizer": "tokenizer",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

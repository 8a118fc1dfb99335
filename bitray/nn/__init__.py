"""Quantisers and the layers made of them. No model, no data, no distribution in here."""

from importlib import import_module
from typing import Any

_HOME = {
    "ternary": "quantize",
    "int8_per_token": "quantize",
    "BitLinear": "linear",
    "bit_linears": "linear",
    "set_strength": "linear",
    "strength_of": "linear",
    "SubLN": "norm",
    "set_saliency": "curricula",
    "set_sparsity": "curricula",
    "LowRank": "correction",
    "LowRankCorrection": "correction",
    "rank_of": "correction",
    "MixtureOfExperts": "moe",
    "TopKRouter": "moe",
    "IdentityRouter": "moe",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitray.nn' has no attribute '{name}'")
    return getattr(import_module(f"bitray.nn.{_HOME[name]}"), name)

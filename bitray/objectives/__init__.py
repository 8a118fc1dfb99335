"""What is minimised: one file per objective, and their weighted sum. No optimizer, no workers."""

from importlib import import_module
from typing import Any

_HOMES = {
    "Objective": "base",
    "HeadObjective": "base",
    "LayerObjective": "base",
    "AttentionObjective": "base",
    "Objectives": "weighted_sum",
    "combined_weights": "weighted_sum",
    "AttentionDistill": "attention_distill",
    "ContinuePretrain": "continue_pretrain",
    "HiddenDistill": "hidden_distill",
    "LogitsDistill": "logits_distill",
    "DLM": "dlm",
    "TCSDistill": "tcs_distill",
    "MoE": "moe",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)

"""Hugging Face models: which layers become ternary, how they load, and their loss in chunks."""

from importlib import import_module
from typing import Any

_HOME = {
    "Batch": "batch",
    "IGNORED": "batch",
    "FAMILIES": "families",
    "Family": "families",
    "family_of": "families",
    "to_bitnet": "convert",
    "is_bitnet": "convert",
    "add_corrections": "low_rank",
    "init_corrections": "low_rank",
    "create_fake_moe": "moe",
    "verify_moe_matches_dense": "moe",
    "build_model": "loading",
    "load_model": "loading",
    "load_teacher": "loading",
    "load_tokenizer": "loading",
    "save_model": "loading",
    "check_documents_isolated": "isolation",
    "LossModel": "losses",
    "TeacherOutput": "losses",
    "Term": "losses",
    "run_teacher": "losses",
    "log_softmax": "logits",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'bitray.models' has no attribute '{name}'")
    return getattr(import_module(f"bitray.models.{_HOME[name]}"), name)

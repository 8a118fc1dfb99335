"""bitray: pretrained causal language models into ternary ones, on a Ray cluster."""

from typing import Any

__all__ = ["Config", "run"]


def __getattr__(name: str) -> Any:
    if name == "run":
        from bitray.pipeline.run import run

        return run
    if name == "Config":
        from bitray.pipeline.config import Config

        return Config
    raise AttributeError(f"module 'bitray' has no attribute '{name}'")

"""What tests of the loop read its metrics with."""

from collections.abc import Mapping


class Keep:
    """A sink that keeps one metric of every step."""

    def __init__(self, name: str = "train/loss") -> None:
        self.name = name
        self.values: list[float] = []

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.values.append(metrics[self.name])

    def flush(self) -> None: ...
    def close(self) -> None: ...

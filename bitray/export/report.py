"""What an export says about itself, and the error of one that fails its own check."""

from dataclasses import dataclass


class ExportError(RuntimeError):
    """The written file does not hold what training used; it was removed again."""


@dataclass(frozen=True)
class Checked:
    """The unpack check: all codes and scales in the file equal those of training.

    `mismatches` can be above zero only where a file holds no codes but masters (`online`).
    """

    tensors: int
    weights: int
    zeros: int
    mismatches: int = 0


@dataclass(frozen=True)
class Report:
    """A finished, checked export. `padding` tells widths that grew, `zeros` the share of code 0."""

    path: str
    type: str
    architecture: str
    bytes: int
    ternary_tensors: int
    ternary_weights: int
    zeros: float
    padding: str | None = None
    mismatches: int = 0

    def __str__(self) -> str:
        padded = f"; padded: {self.padding}" if self.padding else ""
        return (
            f"{self.path}: {self.type} as {self.architecture}, {self.bytes / 1e6:.2f} MB, "
            f"{self.ternary_weights / 1e6:.2f} M weights in {self.ternary_tensors} ternary tensors "
            f"({self.zeros:.0%} zeros), {self.mismatches} mismatches when unpacked again{padded}"
        )

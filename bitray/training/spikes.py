"""Spikes of the training loss: how one is known, and what is told of it."""

from dataclasses import asdict, dataclass
from typing import Any

from pydantic import Field

from bitray.optim import ZClip


class LossSpike(ZClip):
    """A step whose loss stands out from those before it, by the same statistics as `zclip` has of
    gradient norms, begun anew with every phase of a curriculum. Its tickets are recorded."""

    enabled: bool = True
    warmup_steps: int = Field(default=100, ge=2)
    """Losses that are only watched, their plain mean and variance taken."""
    threshold: float = Field(default=8.0, gt=0, allow_inf_nan=False)
    """Standard deviations above the mean."""
    rewind: bool = False
    """Instead of taking the step start again from the last checkpoint, and leave out all steps from
    there to this one: their rows are drawn and not trained on. Each time counts as a failure of the
    workers (`scaling.max_failures`)."""


@dataclass(frozen=True)
class Spike:
    """One such step."""

    step: int
    loss: float
    mean: float
    """Of the losses before it."""
    tickets: tuple[int, int]
    """The first and the last of the step, of all workers."""

    def facts(self) -> dict[str, Any]:
        """For the audit."""
        return asdict(self)

    def __str__(self) -> str:
        first, last = self.tickets
        return (
            f"step {self.step}: the loss of tickets {first} to {last} is {self.loss:.4g}, where "
            f"{self.mean:.4g} is usual"
        )

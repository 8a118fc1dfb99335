"""Early stopping: a stage ends where held-out losses have ceased to fall."""

from typing import NamedTuple

from pydantic import Field

from bitray.settings import Settings


class Plateau(NamedTuple):
    """What is known of the held-out losses of a stage; JSON in a checkpoint."""

    evaluations: int = 0
    best: float | None = None
    """The last one that was lower by more than `min_delta` than the best before it."""
    stale: int = 0
    """Evaluations since then."""


class EarlyStopping(Settings):
    """Ends a stage, as complete, at a plateau of the mean held-out loss."""

    enabled: bool = False
    patience: int = Field(default=5, ge=1)
    """Evaluations in a row without an improvement."""
    min_delta: float = Field(default=0.01, ge=0, allow_inf_nan=False)
    """Nats by which a loss has to be lower to be one."""
    min_evals: int = Field(default=10, ge=1)
    """Evaluations before a stage may end."""

    def watch(self, plateau: Plateau, loss: float) -> Plateau:
        """What is known after one more evaluation."""
        count = plateau.evaluations + 1
        if plateau.best is None or loss < plateau.best - self.min_delta:
            return Plateau(count, loss, 0)
        return Plateau(count, plateau.best, plateau.stale + 1)

    def reason(self, plateau: Plateau) -> str | None:
        """Why a stage ends, or None while it goes on."""
        if plateau.stale < self.patience or plateau.evaluations < self.min_evals:
            return None
        return (
            f"early stopping: in {plateau.stale} evaluations the held-out loss has not fallen by "
            f"{self.min_delta:g} below {plateau.best:.4f}"
        )

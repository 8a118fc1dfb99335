"""ZClip (arXiv 2504.02507): clipping of gradient norms that stand out from those before them."""

import math
from typing import NamedTuple

from pydantic import Field

from bitray.settings import Settings


class Norms(NamedTuple):
    """Running statistics of gradient norms; JSON in a checkpoint."""

    seen: int = 0
    mean: float = 0.0
    variance: float = 0.0


class ZClip(Settings):
    """Besides `max_grad_norm`: what lies `threshold` standard deviations above the mean is clipped,
    the more the further it lies."""

    enabled: bool = False
    warmup_steps: int = Field(default=25, ge=2)
    """Norms that are only watched, their plain mean and variance taken."""
    ema: float = Field(default=0.97, ge=0, lt=1)
    """Weight of the past in mean and variance from then on."""
    threshold: float = Field(default=2.5, gt=0, allow_inf_nan=False)
    """Standard deviations above the mean."""

    def limit(self, norms: Norms, norm: float) -> float:
        """What a finite norm is brought down to; itself or less."""
        spread = math.sqrt(norms.variance)
        excess = norm - norms.mean
        if not self.enabled or norms.seen < self.warmup_steps or excess <= self.threshold * spread:
            return norm
        # z becomes threshold^2 / z, with z = excess / spread
        return norms.mean + self.threshold**2 * spread**2 / excess

    def watch(self, norms: Norms, norm: float) -> Norms:
        """The statistics after a norm, as it was after clipping."""
        assert math.isfinite(norm), "a norm that is not finite would stay in the mean for ever"
        if not self.enabled:
            return norms
        count = norms.seen + 1
        old = 1 - 1 / count if count <= self.warmup_steps else self.ema
        mean = old * norms.mean + (1 - old) * norm
        if count <= self.warmup_steps:  # Welford's: exact for the plain mean of the warm-up
            variance = old * norms.variance + (1 - old) * (norm - norms.mean) * (norm - mean)
        else:
            variance = old * norms.variance + (1 - old) * (norm - mean) ** 2
        return Norms(count, mean, variance)

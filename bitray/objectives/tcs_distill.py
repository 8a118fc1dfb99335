"""Target concrete score: a causal teacher's next-token distribution, for a diffusion student."""

from pydantic import Field

from bitray.objectives.logits_distill import LogitsDistill


class TCSDistill(LogitsDistill):
    """`T^2 * KL(teacher || student)` where either predicts the same masked token.

    The teacher reads the clean text causally, at i-1 for token i; the student guesses token i from
    its noisy block. Only the teacher's `top_k` likeliest tokens are told apart.
    """

    on_masked = True
    view_of = "dlm"

    temperature: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    top_k: int | None = Field(default=100, ge=1)

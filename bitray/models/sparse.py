"""What a teacher that is far away says: of every position the likeliest tokens, and the rest."""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor


def with_rest(logp: Float[Tensor, "n vocab"], ids: Int[Tensor, "n k"]) -> Float[Tensor, "n kept"]:
    """Log-probabilities of `ids` and, in the last place, of everything else together; nothing is
    added where the ids are the whole vocabulary."""
    chosen = logp.gather(-1, ids)
    if ids.shape[-1] == logp.shape[-1]:
        return chosen
    rest = logp.scatter(-1, ids, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([chosen, rest], -1)


@dataclass(frozen=True)
class TopK:
    """A teacher's answer: position p holds what it predicts for the token at p + 1."""

    ids: Int[Tensor, "*at k"]
    """The likeliest tokens, likeliest first."""
    logp: Float[Tensor, "*at kept"]
    """Their log-probabilities and, unless k is the vocabulary, that of everything else together."""
    temperature: float
    """At which they were taken; another one cannot be had from them."""

    @classmethod
    def blank(cls, rows: int, length: int, k: int, kept: int, temperature: float) -> "TopK":
        """For positions that nobody asks about."""
        ids = torch.zeros(rows, length, k, dtype=torch.int32)
        return cls(ids, torch.zeros(rows, length, kept), temperature)

    def at(self, places: Int[Tensor, " n"]) -> "TopK":
        """Of some of all positions, counted through the rows. [n, ...]"""
        ids, logp = (t.flatten(0, -2).index_select(0, places) for t in (self.ids, self.logp))
        return TopK(ids, logp, self.temperature)

    def part(self, rows: slice) -> "TopK":
        """Of a slice of positions."""
        return TopK(self.ids[rows], self.logp[rows], self.temperature)

    def to(self, device: torch.device | str) -> "TopK":
        """On another device."""
        ids, logp = (t.to(device, non_blocking=True) for t in (self.ids, self.logp))
        return TopK(ids, logp, self.temperature)

    def target(self, most: int | None) -> tuple[Float[Tensor, "n kept"], Int[Tensor, "n k"]]:
        """Log-probabilities that sum to 1 whatever they were rounded to on the way, and ids; of
        the `most` likeliest, the others counted among the rest."""
        ids, logp = self.ids.long(), self.logp.float().log_softmax(-1)
        if most is not None and most < ids.shape[-1]:
            rest = logp[..., most:].logsumexp(-1, keepdim=True)
            ids, logp = ids[..., :most], torch.cat([logp[..., :most], rest], -1)
        return logp, ids

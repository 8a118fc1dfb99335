"""APOLLO-Mini (arXiv 2412.05270): one dimension, and one scale for a whole matrix."""

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from bitray.optim.apollo import TINY, ApolloOptimizer, ApolloSettings, sum_over_workers


class ApolloMini(ApolloSettings):
    """APOLLO of rank 1 with as little state as SGD."""

    type: Literal["apollo_mini"] = "apollo_mini"
    scale: float = Field(default=128**0.5, gt=0)
    """What one dimension underestimates the scale by; the paper's square root of 128."""

    def matrix_bytes(self, rows: int, columns: int) -> float:
        return 8.0 * max(rows, columns)

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer of a model's trainable parameters, after they have been sharded."""
        return ApolloMiniOptimizer(self.apollo_groups(model, self.type, 1, self.scale))


class ApolloMiniOptimizer(ApolloOptimizer):
    """APOLLO-Mini on the first group, AdamW on the others."""

    def factors(
        self, params: Sequence[nn.Parameter], before: Sequence[Tensor], after: Sequence[Tensor]
    ) -> list[Tensor]:
        """What this worker's gradients are multiplied by: a number for each matrix."""
        squares = [
            torch.stack([a.square().sum(), b.square().sum()])
            for b, a in zip(before, after, strict=True)
        ]
        sum_over_workers(params, squares)
        return [(one[0].sqrt() / (one[1].sqrt() + TINY)) for one in squares]

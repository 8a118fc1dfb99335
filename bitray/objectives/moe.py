"""What keeps the routers of a mixture of experts balanced and their logits small."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from bitray.nn.moe import Routing, load_balancing_loss, z_loss
from bitray.objectives.base import RouterObjective, Sums, Weight


class MoE(RouterObjective):
    """`balance + z_loss * z` per token, mean over the layers of experts; 1 when balanced.

    Balance is a product of two means over the tokens of a micro-batch, so unlike other objectives
    this one does depend on how a global batch is cut into micro-batches: bigger ones ask less.
    """

    weight: Weight = 0.01
    z_loss: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the z-loss beside the balance (ST-MoE has 0.1 of it)."""

    def on_routers(
        self, routings: Sequence[Routing], real: Bool[Tensor, " tokens"]
    ) -> tuple[Float[Tensor, ""], Sums]:
        """Sum over the real tokens. Reports `balance` and `z`."""
        count = real.sum()
        balance = torch.stack([load_balancing_loss(each, real) for each in routings]).mean() * count
        z = torch.stack([z_loss(each, real) for each in routings]).mean() * count
        return balance + self.z_loss * z, {"balance": balance.detach(), "z": z.detach()}

"""The union of optimizers, told apart by `type`."""

from bitray.optim.adamw import AdamW

Optimizer = AdamW
"""Tagged on `type`; pydantic wants no discriminator before there is a second member."""

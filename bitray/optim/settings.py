"""The union of optimizers, told apart by `type`."""

from typing import Annotated

from pydantic import Field

from bitray.optim.adamw import AdamW
from bitray.optim.muon import Muon

Optimizer = Annotated[AdamW | Muon, Field(discriminator="type")]
"""A node that does not name its `type` is of the default's."""

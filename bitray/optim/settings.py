"""The union of optimizers, told apart by `type`."""

from typing import Annotated

from pydantic import Field

from bitray.optim.adamw import AdamW
from bitray.optim.adamw_8bit import AdamW8bit
from bitray.optim.apollo import Apollo
from bitray.optim.apollo_mini import ApolloMini
from bitray.optim.muon import Muon
from bitray.optim.muonclip import MuonClip

Optimizer = Annotated[
    AdamW | AdamW8bit | Apollo | ApolloMini | Muon | MuonClip, Field(discriminator="type")
]
"""A node that does not name its `type` is of the default's."""

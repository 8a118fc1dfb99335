"""Tickets: the rows of one micro-batch by number, which worker takes which, and when the mixture of
what comes after them is decided.

Ticket t is the rows `t*b .. t*b + b - 1` of the plan, b rows per ticket. The global batch of step k
is tickets `kG .. kG + G - 1`. Neither depends on how many workers there are.
"""

import math
from dataclasses import dataclass

EMPTY = -1
"""Stands in where the workers are more than the tickets left of a step; all its labels are -100."""
ENDED = -2
"""Stands in where no more rows will come, for every ticket of the same step and of later ones."""


@dataclass(frozen=True)
class Deal:
    """Who takes which tickets: of each step, worker r takes its r-th, (r + W)-th, ... ticket."""

    tickets_per_step: int
    world_size: int = 1

    @property
    def micro_batches(self) -> int:
        """Tickets that each worker takes in a step, empty ones included."""
        return math.ceil(self.tickets_per_step / self.world_size)

    def ticket(self, rank: int, position: int) -> int:
        """The ticket that a worker takes at a position, counted from the start of the stage."""
        step, turn = divmod(position, self.micro_batches)
        place = turn * self.world_size + rank
        return step * self.tickets_per_step + place if place < self.tickets_per_step else EMPTY

    def step(self, rank: int, step: int) -> list[int]:
        """The tickets that a worker takes in a step."""
        first = step * self.micro_batches
        return [self.ticket(rank, first + turn) for turn in range(self.micro_batches)]


def least_lead(bundle: int, max_workers: int, tickets_per_step: int) -> int:
    """Steps that decisions have to lead by, so that no worker waits for what only it can decide.

    Tickets travel in bundles of one worker each: those of one step may lie in a bundle with tickets
    of `bundle * max_workers / tickets_per_step` later steps. Twice that, for a bundle on the way.
    """
    return 2 * math.ceil(bundle * max_workers / tickets_per_step)


def decision_after(step: int, first: int, period: int) -> int:
    """The first step of decision later than a step: `first`, then every `period` steps, wherever a
    run was resumed."""
    return first + max(0, (step - first) // period + 1) * period

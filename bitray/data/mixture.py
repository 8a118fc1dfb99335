"""The mixture of one stage while it is trained: decisions, what may be planned, what is resumed.

The control plane without Ray, clocks or files: `MixtureActor` adds those. Decisions are gated, not
raced: one taken at step s takes effect at step s + lead, and rows beyond an undecided step are not
planned. So the stream does not depend on timing.
"""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from bitray.data.plan import Entry, MixturePlan, SourceSize, opening
from bitray.data.tickets import least_lead
from bitray.settings import UserError

RESERVED_STEPS = 64
"""Without gates, how far ahead of what was asked for the promise not to change anything goes."""


class Fenced(RuntimeError):
    """The asker belongs to a group of workers that has been replaced."""


@dataclass(frozen=True)
class StageMixture:
    """What one stage trains on. `lead` is in optimizer steps."""

    seed: int
    manifest: str
    """Identity of the prepared rows; another one is refused on resume."""
    sizes: dict[str, SourceSize]
    """Of every source of the manifest, in its order, which numbers them in batches."""
    weights: dict[str, float]
    length: int
    """Tokens of a row."""
    steps: int
    rows_per_ticket: int
    tickets_per_step: int
    bundle: int = 8
    """Tickets of one worker that travel together; the cost of a stream is by bundle."""
    max_workers: int = 1
    lead: int = 16
    period: int | None = None
    """Steps between decisions; None: no decision is awaited, and the stream never waits for one."""
    first_decision: int | None = None
    """The first step of a decision; None: after one period. Step s is when s steps are done."""
    bounds: tuple[float, float] = (0.0, 1.0)
    max_epochs: int | None = None
    cursors: dict[str, int] = field(default_factory=dict)
    """Rows that the sources gave in earlier stages."""
    after: str | None = None
    """Or: the stage of the same run at whose end the cursors are taken."""

    def __post_init__(self) -> None:
        least = least_lead(self.bundle, self.max_workers, self.tickets_per_step)
        if self.lead < least:
            raise UserError(
                f"lead: {self.lead} steps are too few for bundles of {self.bundle} tickets on "
                f"{self.max_workers} workers at {self.tickets_per_step} tickets a step: workers "
                f"would wait for decisions that they have yet to take; give at least {least}"
            )
        if self.period is not None and self.period < 1:
            raise UserError(f"period: {self.period} is not a number of steps; give 1 or more")

    @property
    def rows_per_step(self) -> int:
        """Global batch in rows."""
        return self.rows_per_ticket * self.tickets_per_step

    @property
    def end(self) -> int:
        """Rows of the whole stage."""
        return self.steps * self.rows_per_step

    def to_json(self) -> dict[str, Any]:
        """A dictionary that `from_json` reads back."""
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "StageMixture":
        """What `to_json` wrote."""
        sizes = {name: SourceSize(*size) for name, size in values["sizes"].items()}
        return cls(**{**values, "sizes": sizes, "bounds": tuple(values["bounds"])})


class Mixture:
    """One stage's journal, and which rows may be planned by it."""

    def __init__(self, stage: StageMixture, generation: int, journal: list[Entry]) -> None:
        self.stage = stage
        self.generation = generation
        self.reserved = 0
        """Rows before this may have been handed out; without gates nothing changes before it."""
        self.plan = MixturePlan(stage.seed, stage.sizes, journal, stage.max_epochs)
        if self.plan.end is not None and self.plan.end < stage.end:
            raise UserError(
                f"max_epochs: {stage.max_epochs} epochs of the sources hold {self.plan.end} rows, "
                f"and {stage.steps} steps of {stage.rows_per_step} rows need {stage.end}"
            )

    @classmethod
    def opened(
        cls,
        stage: StageMixture,
        generation: int,
        state: Mapping[str, Any] | None,
        cursors: Mapping[str, int] | None = None,
        earlier: "Mixture | None" = None,
    ) -> "Mixture":
        """The mixture at the start of a group of workers: from a checkpoint's state, else fresh.

        Decisions later than the checkpoint are dropped, for they will be taken again; without
        gates, what somebody set in the `earlier` generation, and no step will repeat, is kept.
        """
        if state is None:
            begin = opening(stage.sizes, stage.weights, cursors or stage.cursors)
            return cls(stage, generation, [begin])
        _check(stage, state)
        journal = [Entry.from_json(entry) for entry in state["journal"]]
        if earlier is not None and stage.period is None:
            found = list(earlier.plan.journal)
            if found[: len(journal)] == journal:
                journal = found
        mixture = cls(stage, generation, journal)
        mixture.reserved = state["next_row"]
        return mixture

    # ------------------------------------------------------------------------------- planning

    @property
    def next_decision(self) -> int | None:
        """The step of the next decision that is awaited; None if none is."""
        if self.stage.period is None:
            return None
        last = self.plan.journal[-1].step
        first = self.stage.first_decision
        if last < 0 and first is not None:
            return first
        return max(last, 0) + self.stage.period

    @property
    def decided(self) -> int:
        """Rows before this are settled and may be planned."""
        step = self.next_decision
        if step is None:
            return self.stage.end
        return min(self.stage.end, (step + self.stage.lead) * self.stage.rows_per_step)

    def continued(self, stage: StageMixture) -> dict[str, int]:
        """Cursors for a stage that comes after this one; rows of other lengths start afresh."""
        if stage.manifest != self.stage.manifest:
            return {}
        ends = self.plan.cursors(self.stage.end)
        return dict(zip(self.plan.sources, ends, strict=True))

    def reserve(self, until: int) -> bool:
        """Note that rows before `until` are handed out; True if the promise had to be extended."""
        if self.stage.period is not None or until <= self.reserved:
            return False
        self.reserved = until + RESERVED_STEPS * self.stage.rows_per_step
        return True

    # ------------------------------------------------------------------------------- deciding

    def decide(
        self, step: int, weights: Mapping[str, float] | None, notes: Mapping[str, Any] | None = None
    ) -> Entry:
        """Record a decision of a step, once: None changes nothing. Said twice, it is the same."""
        for entry in self.plan.journal:
            if entry.step == step:
                return self._again(entry, weights)
        wanted = self.next_decision
        if wanted is not None and step != wanted:
            raise UserError(
                f"set_weights: step {step} is not a step of decision; the next is {wanted}, "
                f"then every {self.stage.period}"
            )
        last = self.plan.journal[-1]
        if step < last.step:
            raise UserError(f"set_weights: step {step} is before the last decision's, {last.step}")
        size = self.stage.rows_per_step
        row = (step + self.stage.lead) * size
        if wanted is None:
            row = max(row, last.first_row, -(-self.reserved // size) * size)
        # Notes as a file gives them back, so that entries compare equal after a restart.
        written = json.loads(json.dumps(notes or {}))
        entry = self.plan.decide(step, row, weights, written, self.stage.bounds)
        self.plan = self.plan.extended(entry)
        return entry

    def _again(self, entry: Entry, weights: Mapping[str, float] | None) -> Entry:
        before = MixturePlan(
            self.stage.seed,
            self.stage.sizes,
            [e for e in self.plan.journal if e.step < entry.step],
            self.stage.max_epochs,
        )
        same = before.decide(entry.step, entry.first_row, weights, entry.notes, self.stage.bounds)
        if same != entry:
            raise UserError(f"set_weights: step {entry.step} has already been decided differently")
        return entry

    # --------------------------------------------------------------------------------- state

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps holds: a few kB of JSON.

        A decision of that very step has to be recorded before; nobody would take it after a resume.
        """
        awaited = self.next_decision
        assert awaited is None or step < awaited, f"step {awaited} is not decided"
        return {
            "step": step,
            "next_ticket": step * self.stage.tickets_per_step,
            "next_row": step * self.stage.rows_per_step,
            "rows_per_step": self.stage.rows_per_step,
            "generation": self.generation,
            "manifest": self.stage.manifest,
            "seed": self.stage.seed,
            "lead": self.stage.lead,
            "journal": [e.to_json() for e in self.plan.journal if e.step <= step],
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, for a restart of the process that holds it."""
        return {
            "stage": self.stage.to_json(),
            "generation": self.generation,
            "reserved": self.reserved,
            "journal": [entry.to_json() for entry in self.plan.journal],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Mixture":
        """What `to_json` wrote."""
        journal = [Entry.from_json(entry) for entry in values["journal"]]
        mixture = cls(StageMixture.from_json(values["stage"]), values["generation"], journal)
        mixture.reserved = values["reserved"]
        return mixture


def _check(stage: StageMixture, state: Mapping[str, Any]) -> None:
    """Refuse to go on with a state of other data."""
    checked = [
        ("manifest", stage.manifest, "the prepared data"),
        ("seed", stage.seed, "the seed of the data order"),
        ("rows_per_step", stage.rows_per_step, "the global batch in rows"),
    ]
    if stage.period is not None:
        checked.append(("lead", stage.lead, "the steps by which decisions lead"))
    for name, now, what in checked:
        if state[name] != now:
            raise UserError(
                f"resume: {what} was {state[name]} when the checkpoint was written and is {now} "
                "now; restore it, or start the data afresh with resume.load_data_state=false"
            )

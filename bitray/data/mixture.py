"""The mixture of one stage while it is trained: decisions, what may be planned, what is resumed.

The control plane without Ray, clocks or files: `MixtureActor` adds those. Decisions are gated, not
raced: one taken at step s takes effect at step s + lead, and rows beyond an undecided step are not
planned, nor are rows that are still being prepared. So the stream does not depend on timing.
"""

import bisect
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from bitray.data.plan import Entry, MaxEpochs, MixturePlan, SourceSize, opening
from bitray.data.tickets import decision_after, least_lead
from bitray.data.weights import UNIT
from bitray.settings import UserError

RESERVED_STEPS = 64
"""Without gates, how far ahead of what was asked for the promise not to change anything goes."""


PHASE = "phase"
"""Note of the entries that begin a phase of a curriculum."""
TABLES = ("scores", "errors")
"""Notes of every probe and source, for people: the journal of the run has them, no checkpoint."""


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
    max_epochs: MaxEpochs = None
    phases: tuple[tuple[int, dict[str, float]], ...] = ()
    """Later phases of a curriculum: the step each begins with, in order, and its weights."""
    parts: dict[str, str] = field(default_factory=dict)
    """What `manifest` is the hash of, by name, in short: to say what differs on resume."""
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
        phases = tuple((step, weights) for step, weights in values["phases"])
        return cls(
            **dict(values) | {"sizes": sizes, "bounds": tuple(values["bounds"]), "phases": phases}
        )


class _Phase(NamedTuple):
    """A phase of a curriculum that is to be recorded."""

    number: int
    step: int
    first_row: int
    weights: dict[str, float]


class Mixture:
    """One stage's journal, and which rows may be planned by it."""

    def __init__(
        self,
        stage: StageMixture,
        generation: int,
        journal: list[Entry],
        epoch: int = 0,
        reserved: int = 0,
    ) -> None:
        self.stage = stage
        self.generation = generation
        self.epoch = epoch
        """Of the lease of the driver that this was opened for; entries are recorded under it."""
        self.reserved = reserved
        """Rows before this may have been handed out: with gates, those that were trained on before
        the mixture was opened; without them nothing changes before it."""
        self.plan = _planned(stage, journal)
        self._advance()

    @classmethod
    def opened(
        cls,
        stage: StageMixture,
        generation: int,
        state: Mapping[str, Any] | None,
        cursors: Mapping[str, int] | None = None,
        *,
        earlier: "Mixture | None" = None,
        epoch: int = 0,
    ) -> "Mixture":
        """The mixture at the start of a group of workers: from a checkpoint's state, else fresh.

        Decisions later than the checkpoint are dropped, for they will be taken again; without
        gates, what somebody set in the `earlier` generation, and no step will repeat, is kept.
        """
        if state is None:
            begin = opening(stage.sizes, stage.weights, cursors or stage.cursors)
            return cls(stage, generation, [replace(begin, epoch=epoch)], epoch)
        _check(stage, state)
        journal = [Entry.from_json(entry) for entry in state["journal"]]
        found = list(earlier.plan.journal) if earlier is not None else []
        if found[: len(journal)] == journal:  # with their tables
            journal = found[: len(journal) if stage.period else None]
        return cls(stage, generation, journal, epoch, state["next_row"])

    # ------------------------------------------------------------------------------- planning

    @property
    def next_decision(self) -> int | None:
        """The step of the next decision that is awaited; None if none is."""
        if self.stage.period is None:
            return None
        # Who resumes here takes the decisions of later steps only.
        taken = max(self._last_decision.step, self.reserved // self.stage.rows_per_step)
        return decision_after(
            taken, self.stage.first_decision or self.stage.period, self.stage.period
        )

    @property
    def current(self) -> dict[str, float]:
        """Token shares of the sources by the last entry of the journal."""
        shares = zip(self.plan.sources, self.plan.journal[-1].weights, strict=True)
        return {name: weight / UNIT for name, weight in shares}

    @property
    def decided(self) -> int:
        """Rows before this are settled: no decision and no phase can move them any more."""
        coming = self._coming_phase()
        return self._gate if coming is None else min(self._gate, coming.first_row)

    @property
    def _gate(self) -> int:
        """The first row that the next decision may move, or the end."""
        step = self.next_decision
        return self.stage.end if step is None else min(self.stage.end, self._effect(step))

    def _effect(self, step: int) -> int:
        """The first row that a decision of a step moves."""
        row = (step + self.stage.lead) * self.stage.rows_per_step
        row = max(row, self._last_decision.first_row)  # which had no gate, if that was long after
        if self.stage.period is None:
            size = self.stage.rows_per_step
            row = max(row, -(-self.reserved // size) * size)
        return row

    def fixed(self, row: int) -> bool:
        """Whether the cursors at this place are known: not where a source might end before it, of
        which nobody knows so far where it ends."""
        return self.stage.max_epochs is None or self.plan.covers(min(row, self.stage.end))

    def decidable(self, step: int) -> bool:
        """Whether enough is prepared to record a decision of this step."""
        return self.fixed(self._effect(step))

    def ready(self, until: int) -> bool:
        """Whether the whole steps that rows before `until` belong to may be planned."""
        row = self._whole_steps(until)
        return row <= self.decided and self.plan.covers(row)

    def starved(self, until: int) -> bool:
        """Whether decided rows before `until` are not prepared."""
        return not self.plan.covers(min(self._whole_steps(until), self.decided))

    def covered(self) -> int:
        """Rows of all the whole steps that are decided and prepared."""
        size = self.stage.rows_per_step
        steps = range(self.decided // size + 1)
        lack = bisect.bisect_left(steps, True, key=lambda step: not self.plan.covers(step * size))
        return max(0, lack - 1) * size

    def _whole_steps(self, until: int) -> int:
        size = self.stage.rows_per_step
        return min(self.stage.end, -(-until // size) * size)

    def grow(self, sizes: Mapping[str, SourceSize]) -> None:
        """More rows are prepared. `UserError` if they are the last, and too few."""
        stage = replace(self.stage, sizes=dict(sizes))
        self.plan, self.stage = _planned(stage, self.plan.journal), stage
        self._advance()

    def continued(self, stage: StageMixture) -> dict[str, int]:
        """Cursors for a stage that comes after this one; rows of other lengths start afresh."""
        if stage.manifest != self.stage.manifest:
            return {}
        ends = self.plan.cursors(self.stage.end)
        return dict(zip(self.plan.sources, ends, strict=True))

    def promised(self, until: int) -> bool:
        """Whether rows before `until` may be handed out: with gates always."""
        return self.stage.period is not None or until <= self.reserved

    def reserve(self, until: int) -> bool:
        """Note that rows before `until` are handed out; True if the promise had to be extended."""
        if self.promised(until):
            return False
        self.reserved = until + RESERVED_STEPS * self.stage.rows_per_step
        return True

    # ------------------------------------------------------------------------------- deciding

    def decide(
        self, step: int, weights: Mapping[str, float] | None, notes: Mapping[str, Any] | None = None
    ) -> Entry:
        """Record a decision of a step, once: None changes nothing. Said twice, it is the same."""
        for entry in self.plan.journal:
            if entry.step == step and PHASE not in entry.notes:
                return self._again(entry, weights)
        wanted = self.next_decision
        if wanted is not None and step != wanted:
            raise UserError(
                f"set_weights: step {step} is not a step of decision; the next is {wanted}, "
                f"then every {self.stage.period}"
            )
        last = self._last_decision.step
        if step < last:
            raise UserError(f"set_weights: step {step} is before the last decision's, {last}")
        row = self._effect(step)
        assert self.fixed(row), f"step {step} is decided before its rows are known"
        # Without gates, phases may be in the journal that begin later; they are recorded again.
        before = [e for e in self.plan.journal if e.first_row < row or PHASE not in e.notes]
        plan = _planned(self.stage, before)
        entry = plan.decide(step, row, weights, notes, self.stage.bounds)
        entry = replace(entry, epoch=self.epoch)
        self.plan = plan.extended(entry)
        self._advance()
        return entry

    def _again(self, entry: Entry, weights: Mapping[str, float] | None) -> Entry:
        journal = self.plan.journal
        before = _planned(self.stage, journal[: journal.index(entry)])
        same = before.decide(entry.step, entry.first_row, weights, entry.notes, self.stage.bounds)
        if same != entry:
            raise UserError(f"set_weights: step {entry.step} has already been decided differently")
        return entry

    @property
    def _last_decision(self) -> Entry:
        """The opening if there has been none."""
        return [entry for entry in self.plan.journal if PHASE not in entry.notes][-1]

    def _coming_phase(self) -> "_Phase | None":
        """The first phase that is not recorded."""
        number = sum(PHASE in entry.notes for entry in self.plan.journal)
        if number == len(self.stage.phases):
            return None
        step, weights = self.stage.phases[number]
        row = max(step * self.stage.rows_per_step, self.plan.journal[-1].first_row)
        return _Phase(number + 1, step, row, weights)

    def _advance(self) -> None:
        """Record the phases that no decision still to come can precede: as decisions of `lead`
        steps before them, so that a checkpoint holds what goes before its last entry."""
        while (phase := self._coming_phase()) is not None:
            if phase.first_row >= self._gate or not self.fixed(phase.first_row):
                return
            decided = max(-1, phase.step - self.stage.lead)
            notes = {PHASE: phase.number}
            entry = self.plan.decide(decided, phase.first_row, phase.weights, notes)
            self.plan = self.plan.extended(replace(entry, epoch=self.epoch))

    # --------------------------------------------------------------------------------- state

    def state(self, step: int) -> dict[str, Any]:
        """What a checkpoint after `step` steps holds: a few kB of JSON.

        A decision of that very step has to be recorded before; nobody would take it after a resume.
        """
        awaited = self.next_decision
        assert awaited is None or step < awaited, f"step {awaited} is not decided"
        journal = self.plan.journal
        held = max(number for number, entry in enumerate(journal) if entry.step <= step)
        return {
            "step": step,
            "next_ticket": step * self.stage.tickets_per_step,
            "next_row": step * self.stage.rows_per_step,
            "rows_per_step": self.stage.rows_per_step,
            "generation": self.generation,
            "manifest": self.stage.manifest,
            "parts": self.stage.parts,
            "seed": self.stage.seed,
            "lead": self.stage.lead,
            "journal": [_brief(entry).to_json() for entry in journal[: held + 1]],
        }

    def to_json(self) -> dict[str, Any]:
        """All of it, for a restart of the process that holds it."""
        return {
            "stage": self.stage.to_json(),
            "generation": self.generation,
            "epoch": self.epoch,
            "reserved": self.reserved,
            "journal": [entry.to_json() for entry in self.plan.journal],
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Mixture":
        """What `to_json` wrote."""
        journal = [Entry.from_json(entry) for entry in values["journal"]]
        stage = StageMixture.from_json(values["stage"])
        return cls(stage, values["generation"], journal, values.get("epoch", 0), values["reserved"])


def _brief(entry: Entry) -> Entry:
    """An entry as checkpoints have it: all of them, in every checkpoint."""
    return replace(entry, notes={k: v for k, v in entry.notes.items() if k not in TABLES})


def _planned(stage: StageMixture, journal: Sequence[Entry]) -> MixturePlan:
    """The plan of a stage. `UserError` if its sources are known to end before it does."""
    plan = MixturePlan(stage.seed, stage.sizes, journal, stage.max_epochs)
    if plan.end is not None and plan.end < stage.end:
        size = stage.rows_per_step
        rows = sum(source.rows for source in stage.sizes.values())
        enough = -(-(stage.end + sum(journal[0].cursors)) // rows)
        raise UserError(
            f"max_epochs: {stage.max_epochs} epochs of the sources hold {plan.end} rows, and "
            f"{stage.steps} steps of {size} rows need {stage.end}; take at most "
            f"{plan.end // size} steps, or allow max_epochs={enough}"
        )
    return plan


def _check(stage: StageMixture, state: Mapping[str, Any]) -> None:
    """Refuse to go on with a state of other data."""
    then, here = state.get("parts", {}), stage.parts
    differing = [name for name in {**then, **here} if then.get(name) != here.get(name)]
    checked = [
        ("manifest", stage.manifest, "the prepared data"),
        ("seed", stage.seed, "the seed of the data order"),
        ("rows_per_step", stage.rows_per_step, "the global batch in rows"),
    ]
    if stage.period is not None:
        checked.append(("lead", stage.lead, "the steps by which decisions lead"))
    for name, now, what in checked:
        if state[name] != now:
            why = f" ({', '.join(differing)} differs)" if name == "manifest" and differing else ""
            raise UserError(
                f"resume: {what} was {state[name]} when the checkpoint was written and is {now} "
                f"now{why}; restore it, or start the data afresh with "
                "training.resume.load_data_state=false"
            )

"""Training as the control plane sees it, in any order of events: steps, decisions, checkpoints,
crashes, other numbers of workers, other micro-batches, a lost holder of the journal, a second
driver, which is refused, and another one, which takes over from one that is not heard of any more.

The machine keeps its own books (which rows went to whom, what was decided and from which row on)
and holds every row against `naive_order`. What is lost in a crash is lost here as well.
"""

import itertools
import json
import shutil
import tempfile
import time
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import event
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
)
from naive_order import UNIT, Order, Weighting

from bitray import lease
from bitray.data.mixture import Mixture, StageMixture
from bitray.data.plan import SourceSize
from bitray.data.tickets import least_lead
from bitray.settings import UserError

MAX_WORKERS = 8
Row = tuple[int, int, int]
"""Source, epoch, number within the source."""


def through_json(values: Any) -> Any:
    return json.loads(json.dumps(values))


def wishes(sources: int) -> st.SearchStrategy[list[int]]:
    return st.lists(st.integers(0, 6), min_size=sources, max_size=sources).filter(any)


@st.composite
def stages(draw: st.DrawFn) -> StageMixture:
    """A stage of 30 steps, long enough for decisions to take effect and for blocks to end."""
    count = draw(st.integers(1, 4))
    names = "abcd"[:count]
    capped = draw(st.booleans())
    rows = [draw(st.sampled_from([37, 300, 1500, 4000])) for _ in names]
    tokens = [draw(st.integers(n, 9 * n)) for n in rows]
    tickets, bundle = draw(st.integers(1, 8)), draw(st.integers(1, 3))
    most = draw(st.sampled_from([1, 2, MAX_WORKERS]))
    per_ticket = draw(st.sampled_from([1, 6, 24, 60]))
    # Where epochs are capped, every source has to keep some weight, or rows may run out.
    low = draw(st.sampled_from([0.05, 0.1])) if capped else draw(st.sampled_from([0.0, 0.05]))
    high = draw(st.sampled_from([0.6, 1.0])) if count > 1 else 1.0
    steps = 30
    epochs = -(-steps * tickets * per_ticket // sum(rows)) if capped else None
    weights = draw(wishes(count)) if not capped else [1] * count
    return StageMixture(
        seed=draw(st.integers(0, 1)),
        manifest="m",
        sizes={k: SourceSize(*n) for k, *n in zip(names, rows, tokens, strict=True)},
        weights=dict(zip(names, map(float, weights), strict=True)),
        length=16,
        steps=steps,
        rows_per_ticket=per_ticket,
        tickets_per_step=tickets,
        bundle=bundle,
        max_workers=most,
        lead=least_lead(bundle, most, tickets) + draw(st.integers(0, 2)),
        period=draw(st.none() | st.integers(1, 9)),
        first_decision=draw(st.none() | st.integers(1, 4)),
        bounds=(low, high),
        max_epochs=epochs,
        cursors={k: draw(st.integers(0, 50)) for k in names} if not capped else {},
    )


@dataclass
class Decision:
    """What was said at a step, and from which row on it has to hold; None: no change."""

    step: int
    first_row: int
    wish: dict[str, float] | None


@dataclass
class Books:
    """What a checkpoint has to bring back."""

    done: int = 0
    trained: list[Row] = field(default_factory=list)
    tokens: int = 0
    decisions: list[Decision] = field(default_factory=list)

    def copy(self) -> "Books":
        return replace(self, trained=list(self.trained), decisions=list(self.decisions))


class ControlPlane(RuleBasedStateMachine):
    """See the module."""

    # ------------------------------------------------------------------------------- beginning

    @initialize(stage=stages(), data=st.data())
    def begin(self, stage: StageMixture, data: st.DataObject) -> None:
        self.stage, self.workers = stage, data.draw(st.integers(1, stage.max_workers))
        self.size = stage.rows_per_step
        self.names = list(stage.sizes)
        self.books = Books()
        self.checkpoints: list[tuple[dict[str, Any], Books]] = []
        self.drawn: dict[tuple[int, int], Row] = {}
        """Which row a draw of a source was, wherever and whenever it came."""
        self.folder = tempfile.mkdtemp(prefix="bitray-lease-")
        self.clock = time.time()
        self.claim = self.acquire()
        self.orders: dict[tuple[Weighting, ...], Order] = {}
        self.open(Mixture.opened(stage, 1, None, epoch=self.claim.epoch), first_step=0)

    def open(self, mixture: Mixture, first_step: int) -> None:
        """A new group of workers: nothing is handed out to it so far."""
        self.mixture, self.first_step = mixture, first_step
        self.handed: dict[int, list[Row]] = {}
        """Ticket -> rows."""
        self.checked: tuple[Order | None, int, set[int]] = (None, 0, set())
        """Under which order so many rows of training and these tickets were found to be right."""
        self.next_bundle = 0
        self.keep()

    def keep(self) -> None:
        """The actor writes before it answers, and only while the run is its driver's."""
        self.claim.check()
        self.kept = through_json(self.mixture.to_json())

    # ----------------------------------------------------------------------------- handing out

    @property
    def turns(self) -> int:
        """Tickets that each worker takes in a step."""
        return -(-self.stage.tickets_per_step // self.workers)

    def tickets_of(self, rank: int, step: int) -> list[int]:
        """By cards: the tickets of the step go round, one to each worker."""
        first = step * self.stage.tickets_per_step
        return [*range(first, first + self.stage.tickets_per_step)][rank :: self.workers]

    def bundle(self, number: int) -> list[int]:
        """The real tickets of a bundle: consecutive ones of one worker, padded step by step."""
        turn, rank = divmod(number, self.workers)
        mine: list[int | None] = []
        step = self.first_step
        while len(mine) < (turn + 1) * self.stage.bundle and step < self.stage.steps:
            dealt = self.tickets_of(rank, step)
            mine += [*dealt, *[None] * (self.turns - len(dealt))]
            step += 1
        size = self.stage.bundle
        return [t for t in mine[turn * size : (turn + 1) * size] if t is not None]

    def hand_out(self, number: int) -> bool:
        """Plan a bundle as the actor does; False if it has to wait for a decision."""
        tickets = self.bundle(number)
        size = self.stage.rows_per_ticket
        if tickets and (max(tickets) + 1) * size > self.mixture.decided:
            return False
        if tickets:
            if self.mixture.reserve((max(tickets) + 1) * size):
                self.keep()
            rows = self.mixture.plan.pick([t * size for t in tickets], size)
            found = list(zip(*(part.tolist() for part in rows), strict=True))
            for at, ticket in enumerate(tickets):
                assert ticket not in self.handed, "a ticket twice"
                self.handed[ticket] = found[at * size : (at + 1) * size]
        self.next_bundle += 1
        return True

    @rule(count=st.integers(1, 200))
    def read_ahead(self, count: int) -> None:
        for _ in range(count):
            if not self.hand_out(self.next_bundle):
                event("read ahead up to a gate")
                break

    # -------------------------------------------------------------------------------- training

    @property
    def awaited(self) -> int | None:
        """The step of the next decision, by the calendar."""
        first, period = self.stage.first_decision or self.stage.period, self.stage.period
        if first is None or period is None:
            return None
        gone = max([self.first_step, *(each.step for each in self.books.decisions)])
        return next(step for step in itertools.count(first, period) if step > gone)

    @rule(count=st.integers(1, 15), data=st.data())
    def train(self, count: int, data: st.DataObject) -> None:
        for _ in range(min(count, self.stage.steps - self.books.done)):
            if self.books.done == self.awaited:
                self.decide(data)
            self.step()

    def step(self) -> None:
        step = self.books.done
        wanted = [t for rank in range(self.workers) for t in self.tickets_of(rank, step)]
        while not self.handed.keys() >= set(wanted):
            assert self.hand_out(self.next_bundle), "workers wait for what only they can decide"
        mine = [self.handed[ticket] for ticket in sorted(wanted)]
        self.books.trained += [row for rows in mine for row in rows]
        self.books.tokens += sum(self.tokens(row) for rows in reversed(mine) for row in rows)
        self.books.done += 1

    def tokens(self, row: Row) -> int:
        return 1 + hash(row) % 16

    # -------------------------------------------------------------------------------- deciding

    def wish(self, data: st.DataObject) -> dict[str, float] | None:
        found = data.draw(st.none() | wishes(len(self.names)))
        return found and dict(zip(self.names, map(float, found), strict=True))

    def decide(self, data: st.DataObject) -> None:
        """At the step's end, as the loop does."""
        step, wish = self.books.done, self.wish(data)
        issued = max((t + 1 for t in self.handed), default=0) * self.stage.rows_per_ticket
        entry = self.mixture.decide(step, wish, {"why": ("x", step)})
        self.keep()
        if self.stage.period is not None:
            assert entry.first_row == (step + self.stage.lead) * self.size
        assert entry.first_row >= (step + self.stage.lead) * self.size
        assert entry.first_row >= issued, "a decision about what was handed out"
        assert entry.first_row % self.size == 0
        self.books.decisions.append(Decision(step, entry.first_row, wish))
        event("a new weighting" if wish else "no change")

    @precondition(lambda self: self.books.done == self.awaited)
    @rule(data=st.data())
    def decide_what_is_due(self, data: st.DataObject) -> None:
        """So that a checkpoint of the very step of a decision can follow."""
        self.decide(data)

    @precondition(lambda self: self.stage.period is None)
    @rule(data=st.data())
    def set_weights(self, data: st.DataObject) -> None:
        """Somebody has another idea, where nobody waits for one."""
        steps = [each.step for each in self.books.decisions]
        if not steps or self.books.done > max(steps):
            self.decide(data)

    @precondition(lambda self: self.books.decisions)
    @rule(data=st.data())
    def say_again_or_nonsense(self, data: st.DataObject) -> None:
        said = data.draw(st.sampled_from(self.books.decisions))
        entry = self.mixture.decide(said.step, said.wish, {"why": ["x", said.step]})
        assert entry.first_row == said.first_row
        if said.wish is None:
            with pytest.raises(UserError, match="decided differently"):
                self.mixture.decide(said.step, dict.fromkeys(self.names, 1.0))
        journal, step = self.mixture.plan.journal, self.books.done + 1000
        for weights in ({"x": 1.0}, {self.names[0]: -1.0}, dict.fromkeys(self.names, 0.0)):
            with pytest.raises(UserError):
                self.mixture.decide(step, weights)
        assert self.mixture.plan.journal == journal

    # ------------------------------------------------------------------- losing and resuming

    @rule()
    def checkpoint(self) -> None:
        if self.books.done != self.awaited:
            state = through_json(self.mixture.state(self.books.done))
            self.checkpoints.append((state, self.books.copy()))

    @rule(
        event_=st.sampled_from(
            ["crash", "crash and a damaged checkpoint", "resize", "lost holder", "lost driver"]
        ),
        data=st.data(),
    )
    def something_happens(self, event_: str, data: st.DataObject) -> None:
        """All since the newest checkpoint is lost, or since the one before it, and other workers,
        perhaps with another micro-batch, go on from there; or they do so in good order."""
        if event_ == "lost holder" or data.draw(st.booleans()):
            self.mixture = Mixture.from_json(self.kept)
        if event_ == "resize":
            self.checkpoint()
        if event_ == "lost driver":
            self.take_over()
        if event_ == "crash and a damaged checkpoint" and len(self.checkpoints) > 1:
            self.checkpoints.pop()
        # a run would not go so far without a checkpoint
        if event_ != "lost holder" and (self.checkpoints or self.books.done < 9):
            event(event_)
            self.resume(data)

    @rule()
    def second_driver(self) -> None:
        """It is refused, and nothing changes."""
        with pytest.raises(UserError, match="is being written by process"):
            self.acquire()
        self.claim.check()

    def acquire(self) -> lease.Claim:
        return lease.acquire(self.folder, now=lambda: self.clock)

    def take_over(self) -> None:
        """The driver is not heard of for too long; it comes back, and may write no more."""
        first = self.claim
        self.clock += lease.STALE_S + 1
        self.claim = self.acquire()
        assert self.claim.epoch == first.epoch + 1
        with pytest.raises(lease.TakenOver):
            first.check()
        self.mixture = Mixture.from_json({**self.kept, "epoch": self.claim.epoch})

    def resume(self, data: st.DataObject) -> None:
        """Another group of workers begins at the newest checkpoint."""
        state, books = self.checkpoints[-1] if self.checkpoints else (None, Books())
        decisions = self.books.decisions
        self.workers = data.draw(st.integers(1, self.stage.max_workers))
        self.stage = self.timed(self.cut(data), data) if state else self.stage
        generation = self.mixture.generation + 1
        mixture = Mixture.opened(
            self.stage, generation, state, earlier=self.mixture, epoch=self.claim.epoch
        )
        self.open(mixture, books.done)
        self.books = books.copy()
        if state and self.stage.period is None:
            self.books.decisions = decisions  # nobody would say it again

    def cut(self, data: st.DataObject) -> StageMixture:
        """The same global batch in other micro-batches, with a lead that serves them."""
        if not data.draw(st.booleans()):
            return self.stage
        most, lead = self.stage.bundle * self.stage.max_workers, self.stage.lead
        pieces = [
            n for n in range(1, 9) if self.size % n == 0 and lead >= 2 * -(-most // n)
        ]  # fmt: skip
        tickets = data.draw(st.sampled_from([*pieces, self.stage.tickets_per_step]))
        return replace(self.stage, tickets_per_step=tickets, rows_per_ticket=self.size // tickets)

    def timed(self, stage: StageMixture, data: st.DataObject) -> StageMixture:
        """The same with another calendar, if it has one."""
        if stage.period is None or not data.draw(st.booleans()):
            return stage
        first, period = data.draw(st.none() | st.integers(1, 20)), data.draw(st.integers(1, 9))
        return replace(stage, period=period, first_decision=first)

    # ------------------------------------------------------------------------------ invariants

    def order(self) -> Order:
        """The order under what has been decided."""
        changes = [each for each in self.books.decisions if each.wish]
        weights = self.mixture.plan.journal[0].weights
        found = [Weighting(0, weights)]
        for each in changes:
            (entry,) = (e for e in self.mixture.plan.journal if e.step == each.step)
            found.append(Weighting(each.first_row, entry.weights))
        key = tuple(found)
        if key not in self.orders:
            cursors = [self.stage.cursors.get(name, 0) for name in self.names]
            stage = self.stage
            self.orders[key] = Order(stage.seed, stage.sizes, found, cursors, stage.max_epochs)
        return self.orders[key]

    @invariant()
    def every_row_once_and_in_its_place(self) -> None:
        """In training, and in what is handed out, which was planned under fewer decisions than
        there are now. What has been looked at is looked at again if the order is another."""
        trained, order = self.books.trained, self.order()
        assert len(trained) == self.books.done * self.size
        if self.checked[0] is not order:
            self.checked = (order, 0, set())
        _, rows, tickets = self.checked
        self.hold(trained[rows:], order.until(len(trained))[rows:])
        size = self.stage.rows_per_ticket
        for ticket in self.handed.keys() - tickets:
            self.hold(self.handed[ticket], order.until((ticket + 1) * size)[ticket * size :])
        self.checked = (order, len(trained), {*self.handed})
        assert self.books.tokens == sum(map(self.tokens, trained))

    def hold(self, rows: list[Row], draws: list[tuple[int, int]]) -> None:
        """Rows against the draws that they have to be."""
        assert len(rows) == len(draws)
        for row, draw in zip(rows, draws, strict=True):
            source, epoch, number = row
            total = self.stage.sizes[self.names[source]].rows
            assert (source, epoch) == (draw[0], draw[1] // total) and 0 <= number < total
            assert self.drawn.setdefault(draw, row) == row, "another row than before"

    @invariant()
    def the_journal_is_what_was_decided(self) -> None:
        journal = self.mixture.plan.journal
        stage, order = self.stage, self.order()
        low, high = stage.bounds
        assert [e.step for e in journal[1:]] == [d.step for d in self.books.decisions]
        assert [e.first_row for e in journal[1:]] == [d.first_row for d in self.books.decisions]
        version = 0
        for entry, said in zip(journal[1:], self.books.decisions, strict=True):
            version += said.wish is not None
            assert entry.version == version and sum(entry.weights) == UNIT
            if version:
                assert all(low - 1e-9 <= w / UNIT <= high + 1e-9 for w in entry.weights)
            if entry.first_row <= stage.end:
                assert entry.cursors == order.cursors(entry.first_row)
        assert self.mixture.next_decision == self.awaited
        if self.awaited is not None:
            gate = (self.awaited + stage.lead) * self.size
            assert self.mixture.decided == min(stage.end, gate)

    @invariant()
    def epochs_never_fall(self) -> None:
        """In what the actor keeps, which is what an auditor sees."""
        epochs = [entry["epoch"] for entry in self.kept["journal"]]
        assert epochs == sorted(epochs) and epochs[0] >= 1 and epochs[-1] <= self.claim.epoch
        assert self.kept["epoch"] <= self.claim.epoch

    def teardown(self) -> None:
        if not hasattr(self, "drawn"):
            return  # it never began
        shutil.rmtree(self.folder)
        assert len({*self.drawn.values()}) == len(self.drawn), "a row twice in an epoch"
        if self.books.done == self.stage.steps:
            event("trained to the end")
            following = replace(self.stage, weights=dict.fromkeys(self.names, 1.0))
            ends = tuple(self.mixture.continued(following).values())
            assert ends == self.order().cursors(self.stage.end)

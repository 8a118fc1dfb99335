"""Decisions, gates, checkpoints: the control plane under any order of events."""

import json
from typing import Any

import numpy as np
import pytest
from control_plane import ControlPlane
from hypothesis import HealthCheck, settings
from hypothesis.stateful import run_state_machine_as_test

from bitray.data.mixture import Mixture, StageMixture
from bitray.data.plan import SourceSize
from bitray.data.tickets import EMPTY, Deal, least_lead
from bitray.settings import UserError

SIZES = {"a": SourceSize(90, 900), "b": SourceSize(40, 300), "c": SourceSize(777, 7000)}


def stage(**changes: Any) -> StageMixture:
    values: dict[str, Any] = {
        "seed": 0,
        "manifest": "m",
        "sizes": SIZES,
        "weights": {"a": 0.5, "b": 0.25, "c": 0.25},
        "length": 16,
        "steps": 60,
        "rows_per_ticket": 2,
        "tickets_per_step": 4,
        "bundle": 4,
        "lead": 4,
        "max_workers": 2,
    }
    return StageMixture(**{**values, **changes})


def opened(**changes: Any) -> Mixture:
    return Mixture.opened(stage(**changes), 1, None)


def through_json(values: Any) -> Any:
    return json.loads(json.dumps(values))


@pytest.mark.parametrize("workers", [1, 2, 3, 4, 5, 7])
def test_a_step_is_dealt_whole_to_any_number_of_workers(workers: int) -> None:
    deal = Deal(tickets_per_step=4, world_size=workers)
    for step in (0, 3):
        dealt = [deal.step(rank, step) for rank in range(workers)]
        assert {len(mine) for mine in dealt} == {deal.micro_batches}
        real = [ticket for mine in dealt for ticket in mine if ticket != EMPTY]
        assert sorted(real) == list(range(4 * step, 4 * step + 4))


def test_workers_take_tickets_in_turn() -> None:
    assert [Deal(4, 2).step(rank, 3) for rank in range(2)] == [[12, 14], [13, 15]]


def test_a_lead_that_would_deadlock_is_refused() -> None:
    assert least_lead(bundle=8, max_workers=4, tickets_per_step=16) == 4
    stage(bundle=8, max_workers=4, tickets_per_step=16, lead=4)
    with pytest.raises(UserError, match=r"lead: 3 steps are too few .* give at least 4"):
        stage(bundle=8, max_workers=4, tickets_per_step=16, lead=3)


def test_gates_open_decision_by_decision() -> None:
    mixture = opened(period=10)
    assert mixture.next_decision == 10
    assert mixture.decided == (10 + 4) * 8
    entry = mixture.decide(10, {"a": 1.0})
    assert entry.first_row == (10 + 4) * 8
    assert mixture.decided == (20 + 4) * 8
    mixture.decide(20, None)
    assert [e.version for e in mixture.plan.journal] == [0, 1, 1]
    for step in (30, 40, 50):
        mixture.decide(step, None)
    assert mixture.decided == mixture.stage.end


def test_without_gates_everything_is_decided_and_nothing_handed_out_changes() -> None:
    mixture = opened()
    assert mixture.decided == mixture.stage.end
    assert mixture.reserve(200)
    before = mixture.plan.rows(0, 480)
    entry = mixture.decide(3, {"c": 1.0})
    assert entry.first_row >= mixture.reserved - 8
    untouched = min(480, entry.first_row)
    assert (mixture.plan.rows(0, 480).row[:untouched] == before.row[:untouched]).all()


def test_a_decision_said_twice_is_one_and_another_is_refused() -> None:
    mixture = opened(period=10)
    first = mixture.decide(10, {"a": 1.0, "c": 3.0}, {"score": [0.1, 0.2]})
    assert mixture.decide(10, {"a": 1.0, "c": 3.0}, {"score": [0.1, 0.2]}) == first
    assert len(mixture.plan.journal) == 2
    with pytest.raises(UserError, match="step 10 has already been decided differently"):
        mixture.decide(10, {"b": 1.0})
    with pytest.raises(UserError, match="step 17 is not a step of decision; the next is 20"):
        mixture.decide(17, None)


def test_bounds_hold_for_what_is_decided() -> None:
    mixture = opened(period=10, bounds=(0.05, 0.6))
    every = dict.fromkeys(mixture.plan.sources, 0.0) | {"a": 1.0}
    shares = np.array(mixture.decide(10, every).weights) / 4096
    assert shares.sum() == 1 and shares.min() >= 0.05 and shares.max() <= 0.6
    two = mixture.decide(20, {"a": 1.0, "b": 0.0}).weights  # who is not named gets nothing
    assert two == (2457, 1639, *[0] * (len(every) - 2))


@pytest.mark.parametrize(
    ("first", "step", "then"),
    [(20, 50, 56), (20, 10, 20), (20, 20, 26), (None, 35, 36), (None, 36, 42), (55, 3, 55)],
)
def test_gates_that_are_new_on_resume_wait_for_the_next_step_of_the_calendar(
    first: int | None, step: int, then: int
) -> None:
    """Decisions of `first`, `first + 6`, ... (by itself 6), of which those up to the checkpoint's
    step will not be taken any more; whether there were others before does not matter."""
    for before in (opened(), opened(period=7), opened(period=5, first_decision=1)):
        for decided in range(1, step + 1):
            if decided == before.next_decision:
                before.decide(decided, {"a": 1.0, "b": 1.0})
        again = stage(period=6, first_decision=first)
        mixture = Mixture.opened(again, 2, through_json(before.state(step)), earlier=before)
        mixture = Mixture.from_json(through_json(mixture.to_json()))
        assert mixture.next_decision == then and mixture.decided == min(480, (then + 4) * 8)
        assert mixture.decide(then, {"c": 1.0}).first_row == (then + 4) * 8
        assert mixture.next_decision == then + 6


def test_gates_after_a_decision_without_them_that_holds_long_after_it_was_taken() -> None:
    before = opened()
    before.reserved = 30 * 8
    before.decide(3, {"c": 1.0})
    mixture = Mixture.opened(stage(period=6), 2, through_json(before.state(4)))
    assert mixture.next_decision == 6 and mixture.decided == 30 * 8
    assert mixture.decide(6, {"a": 1.0}).first_row == 30 * 8


def test_checkpoints_hold_the_running_mean_and_leave_tables_to_the_journal() -> None:
    """Six probes and six sources: the tables are most of an entry, and all entries lie in every
    checkpoint. Who resumes where the journal is keeps them."""
    names = "abcdef"
    table = {probe: dict.fromkeys(names, 0.12345678901234567) for probe in names}
    standing = dict.fromkeys(names, 0.12345678901234567)
    mixture = opened(period=10)
    notes = {"method": "cosine", "scores": table, "errors": table, "standing": standing}
    entry = mixture.decide(10, {"a": 1.0}, notes)
    assert mixture.to_json()["journal"][-1]["notes"] == notes
    state = through_json(mixture.state(12))
    assert state["journal"][-1]["notes"] == {"method": "cosine", "standing": standing}
    assert len(json.dumps(state["journal"][-1])) < 500 < len(json.dumps(entry.to_json()))
    mixture.decide(20, {"b": 1.0})
    again = Mixture.opened(mixture.stage, 2, state, earlier=mixture)
    assert again.plan.journal == mixture.plan.journal[:2]
    assert again.plan.journal[-1].notes == notes
    assert Mixture.opened(mixture.stage, 2, state).plan.journal == again.plan.journal


def test_decisions_after_the_checkpoint_are_dropped_and_taken_again() -> None:
    mixture = opened(period=10)
    mixture.decide(10, {"a": 1.0})
    state = through_json(mixture.state(12))
    mixture.decide(20, {"b": 1.0})
    final = mixture.plan.rows(0, 480)
    again = Mixture.opened(mixture.stage, 2, state, earlier=mixture)
    assert again.next_decision == 20 and again.decided == (20 + 4) * 8
    again.decide(20, {"b": 1.0})
    assert again.plan.journal == mixture.plan.journal
    assert (again.plan.rows(0, 480).row == final.row).all()


def test_without_gates_what_somebody_set_survives_a_restart_of_the_workers() -> None:
    mixture = opened()
    mixture.reserve(40)
    state = through_json(mixture.state(3))
    mixture.decide(5, {"c": 1.0})
    again = Mixture.opened(mixture.stage, 2, state, earlier=mixture)
    assert again.plan.journal == mixture.plan.journal


def test_a_restarted_holder_answers_as_the_lost_one() -> None:
    mixture = opened(period=10)
    mixture.decide(10, {"a": 0.3, "b": 0.7}, {"why": ("x", 1)})
    copy = Mixture.from_json(through_json(mixture.to_json()))
    assert copy.stage == mixture.stage and copy.plan.journal == mixture.plan.journal
    assert copy.decided == mixture.decided


def test_a_checkpoint_before_its_steps_decision_is_a_mistake_of_ours() -> None:
    mixture = opened(period=10)
    mixture.state(9)
    with pytest.raises(AssertionError, match="step 10 is not decided"):
        mixture.state(10)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"manifest": "other"}, "the prepared data was m"),
        ({"seed": 5}, "the seed of the data order was 0"),
        ({"rows_per_ticket": 3}, "the global batch in rows was 8"),
        ({"lead": 5}, "the steps by which decisions lead was 4"),
    ],
)
def test_a_state_of_other_data_is_refused(changes: dict[str, Any], said: str) -> None:
    state = through_json(opened(period=10).state(5))
    with pytest.raises(UserError, match=said):
        Mixture.opened(stage(period=10, **changes), 2, state)


def test_the_micro_batch_may_change_on_resume() -> None:
    mixture = opened()
    state = through_json(mixture.state(5))
    again = Mixture.opened(stage(rows_per_ticket=1, tickets_per_step=8), 2, state)
    assert (again.plan.rows(40, 100).row == mixture.plan.rows(40, 100).row).all()


def test_too_few_rows_for_the_stage_is_said_before_it_starts() -> None:
    with pytest.raises(UserError, match="max_epochs: 1 epochs of the sources hold 907 rows"):
        opened(max_epochs=1, steps=200)


# ------------------------------------------------------------------------------------- phases

PHASES = ((12, {"a": 1.0}), (17, {"b": 1.0}), (40, {"a": 0.5, "c": 0.5}))


def sources_of(mixture: Mixture, step: int) -> set[int]:
    """The sources that a step trains on."""
    size = mixture.stage.rows_per_step
    return set(mixture.plan.rows(step * size, size).source.tolist())


def test_phases_switch_at_their_steps_and_are_known_from_the_opening() -> None:
    mixture = opened(phases=PHASES)
    assert mixture.decided == mixture.stage.end
    assert [e.first_row for e in mixture.plan.journal] == [0, 12 * 8, 17 * 8, 40 * 8]
    assert [e.notes for e in mixture.plan.journal] == [{}, *({"phase": k} for k in (1, 2, 3))]
    assert [sources_of(mixture, step) for step in (12, 16, 17, 39)] == [{0}, {0}, {1}, {1}]
    assert sources_of(mixture, 11) == {0, 1, 2} and sources_of(mixture, 41) <= {0, 2}


def test_phases_and_decisions_take_turns() -> None:
    """A decision of step s holds from step s + 4 to the next phase; 'no change' keeps the phase,
    and a phase wins over a decision for the same step."""
    mixture = opened(period=10, phases=(*PHASES[:2], (34, {"b": 1.0}), PHASES[2]))
    assert len(mixture.plan.journal) == 2, "what a decision may come before is not recorded"
    assert mixture.decided == 14 * 8
    entry = mixture.decide(10, {"c": 1.0})
    assert mixture.decide(10, {"c": 1.0}) == entry, "said twice it is one"
    assert [sources_of(mixture, step) for step in (13, 14, 16, 17)] == [{0}, {2}, {2}, {1}]
    mixture.decide(20, None)
    assert sources_of(mixture, 25) == {1} and mixture.next_decision == 30
    mixture.decide(30, {"a": 1.0})
    assert sources_of(mixture, 34) == {1}
    mixture.decide(40, None)
    mixture.decide(50, None)
    assert mixture.decided == mixture.stage.end
    assert [e.step for e in mixture.plan.journal] == [-1, 8, 10, 13, 20, 30, 30, 36, 40, 50]
    assert sources_of(mixture, 59) <= {0, 2}


def test_a_decision_without_gates_lasts_until_the_next_phase() -> None:
    mixture = opened(phases=PHASES)
    mixture.reserved = 13 * 8
    entry = mixture.decide(2, {"c": 1.0})
    assert entry.first_row == 13 * 8
    assert [sources_of(mixture, step) for step in (12, 13, 16, 17)] == [{0}, {2}, {2}, {1}]
    again = Mixture.opened(mixture.stage, 2, through_json(mixture.state(5)), earlier=mixture)
    assert again.plan.journal == mixture.plan.journal


# ------------------------------------------------------------------- while data is prepared


def growing(rows: int, **changes: Any) -> Mixture:
    """Source `c` has so many rows so far, and 777 in the end."""
    size = SIZES["c"]._replace(rows=rows, sample=777, done=False)
    return opened(sizes={**SIZES, "c": size}, weights={"a": 1.0, "c": 9.0}, **changes)


def test_whole_steps_are_planned_whose_rows_are_prepared() -> None:
    mixture, whole = growing(100), opened(weights={"a": 1.0, "c": 9.0})
    ready = mixture.covered()
    assert ready % 8 == 0 and 100 <= ready < 130
    assert mixture.ready(ready) and not mixture.starved(ready)
    assert not mixture.ready(ready + 1) and mixture.starved(ready + 1)
    assert (mixture.plan.rows(0, ready).source == whole.plan.rows(0, ready).source).all()
    mixture.grow(SIZES)
    assert mixture.covered() == mixture.stage.end
    assert mixture.plan.rows(0, 480).row.tolist() == whole.plan.rows(0, 480).row.tolist()


def test_where_a_source_may_end_a_later_phase_waits_until_that_is_known() -> None:
    mixture = growing(100, max_epochs=1, phases=((30, {"b": 1.0, "c": 1.0}),))
    assert mixture.decided == 30 * 8 and len(mixture.plan.journal) == 1
    assert not mixture.decidable(20) and mixture.decidable(1)
    mixture.grow(SIZES)
    assert mixture.decided == mixture.stage.end and len(mixture.plan.journal) == 2


def test_too_few_rows_are_said_when_it_is_known() -> None:
    mixture = growing(100, max_epochs=1, steps=200)
    with pytest.raises(UserError, match=r"hold 867 rows.* at most 108 steps, or .*max_epochs=2"):
        mixture.grow(SIZES)
    assert mixture.covered() < mixture.stage.end, "it goes on as before"


def test_a_limit_of_one_source() -> None:
    mixture = opened(max_epochs={"b": 2})
    drawn = mixture.plan.rows(0, 480)
    assert np.bincount(drawn.source)[1] == 80 and drawn.epoch[drawn.source == 0].max() > 1


def test_what_differs_in_other_data_is_named() -> None:
    state = through_json(opened(parts={"length": "1", "source 'a'": "2"}).state(5))
    other = stage(manifest="other", parts={"length": "1", "source 'a'": "3", "source 'd'": "4"})
    with pytest.raises(UserError, match=r"is other now \(source 'a', source 'd' differs\)"):
        Mixture.opened(other, 2, state)


RUNS = settings(stateful_step_count=30, suppress_health_check=list(HealthCheck))


def test_the_control_plane_keeps_its_promises_in_a_hundred_lives() -> None:
    run_state_machine_as_test(ControlPlane, settings=settings(RUNS, max_examples=100))


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_and_in_thousands() -> None:
    run_state_machine_as_test(ControlPlane, settings=settings(RUNS, max_examples=5000))

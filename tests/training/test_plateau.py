"""Early stopping, against its definition told over a whole list of losses."""

import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_loop import loop, settings, tickets

from bitray.training import state
from bitray.training.loop import Every
from bitray.training.plateau import EarlyStopping, Plateau
from bitray.training.settings import Resume


def naively(losses: list[float], patience: int, delta: float, least: int) -> int | None:
    """After how many losses it ends: so many in a row are not lower than the reference by delta."""
    reference, last = math.inf, 0
    for number, loss in enumerate(losses, 1):
        if loss < reference - delta:
            reference, last = loss, number
        if number - last >= patience and number >= least:
            return number
    return None


@given(
    st.lists(st.sampled_from([3.0, 2.99, 2.98, 2.5, 2.495, 2.0]), max_size=20),
    st.integers(1, 4),
    st.sampled_from([0.0, 0.01, 0.3]),
    st.integers(1, 8),
)
def test_it_ends_where_losses_have_ceased_to_fall(losses, patience, delta, least):
    rule = EarlyStopping(enabled=True, patience=patience, min_delta=delta, min_evals=least)
    plateau, found = Plateau(), None
    for number, loss in enumerate(losses, 1):
        plateau = rule.watch(plateau, loss)
        if rule.reason(plateau) and found is None:
            found = number
    assert found == naively(losses, patience, delta, least)


GIVEN = {
    "max_steps": 30, "log_every": 100, "lambda_warmup": {"warmup_steps": 4},
    "early_stopping": {"enabled": True, "patience": 2, "min_evals": 3},
}  # fmt: skip


def test_a_stage_ends_at_a_plateau_and_a_resumed_one_at_the_same(tmp_path: Path) -> None:
    """Evaluations at steps 2 and 4 come before full strength; those at 6 to 10 are counted."""
    run = loop(settings(**GIVEN))
    run.hooks = [Every(2, lambda each: each.watch(2.0))]
    run.run(tickets())
    assert run.at_end and not run.stopped and run.position.step == 10
    assert (
        "in 2 evaluations the held-out loss has not fallen by 0.01 below 2.0" in run.position.ended
    )

    half = loop(settings(**GIVEN))
    half.hooks = [*run.hooks, Every(8, lambda each: setattr(each, "stopped", True))]
    half.run(tickets())
    directory = str(tmp_path / "half")
    held = state.as_json(half.position, {"step": half.data_step})
    state.save(directory, half.model, half.optimizer, held, {})
    rest = loop(settings(**GIVEN))
    rest.position, _ = state.resume(directory, rest.model, rest.optimizer, Resume())
    assert rest.position.plateau == Plateau(2, 2.0, 1)
    rest.data_step, rest.hooks = half.data_step, run.hooks
    rest.run(tickets(2 * rest.data_step))
    assert rest.position.step == 10 and rest.position.ended == run.position.ended


def test_what_has_been_done_is_logged_where_an_evaluation_ends_it() -> None:
    lines: list[int] = []

    class Sink:
        def write(self, stage, step, metrics):
            lines.append(step)

        def flush(self): ...
        def close(self): ...

    run = loop(settings(**GIVEN), sinks=[Sink()])
    run.hooks = [Every(2, lambda each: each.watch(2.0))]
    run.run(tickets())
    assert lines == [10]


def test_it_is_off_unless_asked_for() -> None:
    run = loop(settings(max_steps=6))
    run.hooks = [Every(1, lambda each: [each.watch(2.0) for _ in range(50)])]
    run.run(tickets())
    assert run.position.step == 6 and run.position.ended is None
    with pytest.raises(ValueError, match="patience"):
        EarlyStopping(patience=0)

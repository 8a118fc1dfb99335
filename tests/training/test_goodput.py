"""Where time goes: against seconds counted by hand, with a clock that stands in for the wall's."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitray.training import goodput
from bitray.training.goodput import CAUSES, LOST, PRODUCTIVE, Clock, Ledger


class Wall:
    """Seconds that pass when told to."""

    def __init__(self, at: float = 1000.0) -> None:
        self.at = at

    def __call__(self) -> float:
        return self.at


@given(st.lists(st.tuples(st.sampled_from(CAUSES), st.floats(0, 1e5)), max_size=30))
def test_every_second_belongs_to_one_cause(turns: list[tuple[str, float]]) -> None:
    wall = Wall()
    clock, told = Clock("start", wall), dict.fromkeys(CAUSES, 0.0)
    for cause, seconds in turns:
        clock.switch(cause)
        wall.at += seconds
        told[cause] += seconds
    shares, total = clock.shares(), wall.at - 1000
    assert clock.seconds == pytest.approx(told, abs=1e-6)
    assert sum(shares.values()) == pytest.approx(1) if total else shares == {}


def test_what_happens_within_something_else_is_counted_once() -> None:
    wall = Wall()
    clock = Clock(PRODUCTIVE, wall)
    wall.at += 10
    with clock.during("evaluation"):
        wall.at += 3
        with clock.during("checkpoint"):  # a new best is kept
            wall.at += 2
        wall.at += 1
    wall.at += 4
    clock.settle()
    found = {cause: seconds for cause, seconds in clock.seconds.items() if seconds}
    assert found == {PRODUCTIVE: 14, "evaluation": 4, "checkpoint": 2}
    assert clock.last == {"evaluation": 6, "checkpoint": 2} and clock.unsaved == 14


def test_a_clock_that_is_set_back_takes_nothing_away() -> None:
    wall = Wall()
    clock = Clock(PRODUCTIVE, wall)
    wall.at -= 50
    clock.settle()
    wall.at += 5
    clock.settle()
    assert clock.seconds[PRODUCTIVE] == 5


def started(folder: Path, wall: Wall) -> tuple[Clock, Ledger]:
    clock = Clock("start", wall)
    return clock, Ledger(str(folder), clock)


def taken(ledger: Ledger, clock: Clock, wall: Wall, seconds: float, step: int) -> None:
    """Steps, and a line of metrics."""
    with clock.during(PRODUCTIVE):
        wall.at += seconds
        ledger.write("stage2", step, {})


def test_failures_and_stops_are_told_apart(tmp_path: Path) -> None:
    """Workers start in 20 s, take 100 s of steps, save, take 30 s more and die. The next ones are
    there after 15 s, take the 30 s again and 40 more, save. Then somebody stops the run for a day;
    the same command begins, starts workers in 25 s, and they take 10 s."""
    wall = Wall()
    goodput.begin(str(tmp_path), wall())
    wall.at += 20
    clock, ledger = started(tmp_path, wall)
    taken(ledger, clock, wall, 100, 10)
    ledger.saving()()
    taken(ledger, clock, wall, 30, 13)
    wall.at += 15  # nobody writes any more
    clock, ledger = started(tmp_path, wall)
    taken(ledger, clock, wall, 70, 17)
    ledger.saving()()
    wall.at += 86_400
    goodput.begin(str(tmp_path), wall())
    wall.at += 25
    clock, ledger = started(tmp_path, wall)
    taken(ledger, clock, wall, 10, 18)
    ledger.close()
    held = goodput.read(str(tmp_path))
    assert held is not None
    found = {cause: seconds for cause, seconds in held["seconds"].items() if seconds}
    assert found == pytest.approx({"start": 45, PRODUCTIVE: 180, LOST: 30, "restart": 15})
    assert held["unsaved"] == 10


def test_missed_checkpoints_are_counted(tmp_path: Path) -> None:
    """One save period may pass before a checkpoint; at the third without any, two are missing."""
    wall = Wall()
    _, ledger = started(tmp_path, wall)
    for step, missed in ((5, 0), (15, 0), (24, 0), (25, 1), (35, 2)):
        ledger.write("stage2", step, {})
        assert ledger.metrics(save_every=10)["train/checkpoints_missed"] == missed
    ledger.saving()()
    assert ledger.metrics(10)["train/checkpoints_missed"] == 0
    ledger.write("stage3", 1, {})  # a stage of its own, whose steps begin anew
    assert ledger.metrics(10)["train/checkpoints_missed"] == 0
    assert sum(v for k, v in ledger.metrics(10).items() if k.startswith("goodput/")) in (0, 1)


def test_a_checkpoint_counts_once_it_is_complete(tmp_path: Path) -> None:
    """30 s go by while it is written; a worker that dies before its end has lost all 130 s, one
    that dies later those 30."""
    lost = []
    for complete in (False, True):
        wall, folder = Wall(), tmp_path / str(complete)
        clock, ledger = started(folder, wall)
        taken(ledger, clock, wall, 100, 10)
        saved = ledger.saving()
        taken(ledger, clock, wall, 30, 13)
        if complete:
            saved()
        ledger.write("stage2", 13, {})
        clock, ledger = started(folder, wall)
        lost.append(clock.seconds[LOST])
    assert lost == [130, 30]


def test_methods_are_counted() -> None:
    wall = Wall()

    class Worker:
        clock = Clock(PRODUCTIVE, wall)

        @goodput.counted("evaluation")
        def evaluate(self, seconds: float, *, fail: bool = False) -> str:
            wall.at += seconds
            if fail:
                raise OSError("gone")
            return "done"

    worker = Worker()
    assert worker.evaluate(7) == "done"
    with pytest.raises(OSError):
        worker.evaluate(2, fail=True)
    assert worker.clock.seconds["evaluation"] == 9
    assert worker.clock.switch("other") == PRODUCTIVE, "also after a failure"


@pytest.mark.parametrize("remote", [False, True])
def test_object_storage_is_written_to_with_checkpoints_alone(
    tmp_path: Path, remote: bool, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue("s3") if remote else str(tmp_path)
    wall = Wall()
    clock = Clock("start", wall)
    ledger = Ledger(folder, clock)
    taken(ledger, clock, wall, 10, 1)
    held: Callable[[], float] = lambda: goodput.read(folder)["seconds"][PRODUCTIVE]  # type: ignore[index]  # noqa: E731
    assert held() == (0 if remote else 10)
    ledger.saving()()
    assert held() == 10


def test_the_file_is_plain(tmp_path: Path) -> None:
    Ledger(str(tmp_path), Clock("start", Wall()))
    held = json.loads((tmp_path / goodput.FILE).read_text())
    assert set(held) == {"seconds", "unsaved", "until", "running"}

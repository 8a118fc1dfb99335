"""Hanging and slow workers, by clocks that are set and threads that really hang."""

import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_loop import batch, loop, settings

from bitray.data.tickets import Deal
from bitray.models.batch import Batch
from bitray.training import watch
from bitray.training.loop import Every
from bitray.training.watch import Stragglers, Watchdog, place, stacks


def test_a_step_that_does_not_end_is_told_once_with_its_place() -> None:
    told: list[tuple[float, float, str, str]] = []
    thread, released = threading.get_ident(), threading.Event()

    def hung(seconds: float, median: float) -> None:
        told.append((seconds, median, place(thread), stacks()))
        released.set()

    dog = Watchdog(1.0, hung)

    def stuck() -> Iterator[tuple[int, Batch]]:
        for ticket in range(8):
            if ticket == 6:
                assert released.wait(30), "nobody noticed"
            yield ticket, batch(ticket)

    run = loop(settings(max_steps=4), hooks=[Every(1, dog.ended), Every(1, dog.begins)])
    run.run(stuck())
    dog.close()
    ((seconds, median, where, text),) = told
    assert 1.0 < seconds < 20 and 0 < median < 1
    assert where.startswith("in training/loop.py:") and "Loop._draw" in where
    assert "stuck" in text and "Thread" in text


def test_side_work_may_take_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[float] = []
    monkeypatch.setattr(watch, "BETWEEN", 1000)
    dog = Watchdog(0.2, lambda *_: told.append(1.0))
    dog.begins()
    dog.ended()
    time.sleep(0.6)
    assert not told
    dog.begins()
    end = time.monotonic() + 20
    while not told and time.monotonic() < end:
        time.sleep(0.05)
    assert told == [1.0]


def test_a_slow_worker_is_named_within_twenty_steps_and_once() -> None:
    found = Stragglers()
    said = [found.note([0.10, 0.11, 0.10, 0.40], 0.5) for _ in range(60)]
    assert [at for at, text in enumerate(said) if text] == [9]
    assert said[9] == "worker 3 is slow: 0.4 s of own work in a step, the others 0.1 s"
    assert not any(found.note([0.10, 0.11, 0.10, 0.12], 0.5) for _ in range(10)), "recovered"
    assert any(found.note([0.10, 0.11, 0.10, 0.40], 0.5) for _ in range(10)), "again"


@pytest.mark.parametrize("own", [[0.01, 0.02], [0.3, 0.4], [0.5]])
def test_noise_and_unimportant_differences_name_nobody(own: list[float]) -> None:
    found = Stragglers()
    assert not any(found.note(own, 0.5) for _ in range(60))


def test_own_work_is_what_comes_before_the_first_collective_and_in_the_layers() -> None:
    run = loop(settings(max_steps=3))
    slept, inside = 0.05, 0.02
    first = run.model.model.model.layers[0]

    def sleep(_: Any, __: Any, out: torch.Tensor) -> None:
        time.sleep(inside)
        out.register_hook(lambda _: time.sleep(inside))

    first.mlp.register_forward_hook(sleep)
    seen: list[float] = []
    note = run.stragglers.note
    run.stragglers.note = lambda own, step: seen.extend(own) or note(own, step)  # type: ignore

    def drawn() -> Iterator[tuple[int, Batch]]:
        for ticket in range(6):
            time.sleep(slept if ticket % 2 else 0)
            yield ticket, batch(ticket)

    run.run(drawn())
    assert len(seen) == 3 and Deal(2, 1).micro_batches == 2
    assert seen[0] >= slept
    assert min(seen[1:]) >= slept + 4 * inside, "with the layers' of before, forward and back"
    assert not first._forward_hooks and not first._forward_pre_hooks, "the hooks are gone"

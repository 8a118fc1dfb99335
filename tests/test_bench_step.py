"""The benchmark of a ternary step: its figures by hand, its refusals, and that it runs."""

import sys

import bench_step
import pytest
import torch


def test_ratios_are_of_pairs_and_the_first_three_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken = iter([100.0] * 6 + [2.0, 1.0, 3.0, 2.0, 8.0, 4.0, 5.0, 5.0, 9.0, 3.0])
    monkeypatch.setattr(bench_step, "seconds", lambda _: next(taken))
    line = bench_step.compared("x", lambda: None, lambda: None, pairs=5)
    assert line.ours == 5000 and line.dense == 3000  # the medians, in ms
    assert line.ratio == 2.0  # of 2, 1.5, 2, 1, 3
    assert line.spread == pytest.approx(2.5 - 1.25)


@pytest.mark.parametrize(("words", "said"), [
    (["--models", "7b"], "--models: 7b is none of small, 135m, 1.7b, 4b"),
    (["--pairs", "1"], "--pairs: two at least"),
    (["--settings", "attention=flash"], "--settings: attention: "),
])  # fmt: skip
def test_what_cannot_be_measured(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    said: str,
) -> None:
    monkeypatch.setattr(sys, "argv", ["bench_step.py", *words])
    assert bench_step.main() == 2
    assert capsys.readouterr().err.startswith(said)


def test_a_step_of_both_models_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(bench_step.ROWS, "small", (2, 64))
    line = bench_step.steps("small", {"logits_chunk": "64"}, torch.device("cpu"), pairs=2)
    assert line.what == "step of small, 2x64 tokens"
    assert line.ours > 0 and line.dense > 0

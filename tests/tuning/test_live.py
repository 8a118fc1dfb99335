"""How a sweep is shown while it goes on: known words, and trials of Tune on a terminal and off."""

import json
import os
import pty
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitray.tuning import AxSearcher, SearchSpace
from bitray.tuning.cost import Clock, read_spans
from bitray.tuning.live import Standing, Watch, clock, line, summary, table
from bitray.tuning.searcher import Found
from bitray.tuning.trial import trial_name

SPACE = SearchSpace.load_text(
    yaml.safe_dump(
        {
            "parameters": {
                "stages.stage2.optimizer.lr": {"uniform": [0.0, 1.0]},
                "stages.stage2.optimizer.type": {"choice": ["muon", "adamw"]},
            },
            "objectives": {"loss": "minimize"},
            "start": [
                {"stages.stage2.optimizer.lr": lr, "stages.stage2.optimizer.type": kind}
                for lr, kind in ((0.25, "muon"), (0.75, "muon"), (0.5, "adamw"), (1.0, "adamw"))
            ],
            "num_trials": 4,
            "sobol_trials": 4,
        }
    ),
    "here",
)
LR, TYPE = SPACE.parameters


def standing(index: int, state: str, done: float, loss: float | None, seconds: float) -> Standing:
    told = {"progress": done, "tokens_per_second": 2048.0}
    if loss is not None:
        told["loss"] = loss
    return Standing(index, state, {LR: 0.25, TYPE: "muon"}, told, seconds)


STANDINGS = [
    standing(1, "completed", 1.0, 2.5, 100.0),
    standing(2, "early_stopped", 0.5, 2.0, 50.0),
    standing(3, "runs", 0.25, 3.0, 30.0),
]


def test_a_table_of_trials() -> None:
    shown = table(SPACE, STANDINGS)
    assert list(shown.header) == [
        "trial", "state", "done", "loss", "tokens/s", "left", "optimizer.lr", "optimizer.type",
    ]  # fmt: skip
    assert shown.rows == [
        ["3", "runs", "25%", "3", "2048", "1:30", "0.25", "muon"],
        ["2", "early stopped", "50%", "2", "2048", "", "0.25", "muon"],
        ["1", "completed", "100%", "2.5", "2048", "", "0.25", "muon"],
    ]


def test_a_summary_by_hand() -> None:
    """One of four ended before; 2 in 100 s and a quarter: 0.75 are left at 2.25 in 100 s."""
    before = [Found(0, {}, "completed", {"loss": 2.25})]
    assert summary(SPACE, before, STANDINGS, 100.0) == (
        "3 of 4 trials ended; running 3 25% loss 3; best 0 (loss 2.25); 72 trials/h; 0:33 left"
    )
    assert summary(SPACE, [], STANDINGS[2:], 9.0) == "0 of 4 trials ended; running 3 25% loss 3"
    assert "best 1 (loss 2.5)" in summary(SPACE, [], STANDINGS, 9.0)


def test_a_line_of_a_trial_that_ended() -> None:
    assert line(SPACE, STANDINGS[1]) == (
        "trial 2 early stopped at 50% after 0:50: loss 2  [optimizer.lr 0.25, optimizer.type muon]"
    )
    lost = Standing(3, "abandoned", {LR: 0.25}, {"progress": 0.1}, 3.0, "no memory")
    assert line(SPACE, lost).startswith("trial 3 abandoned (no memory) at 10% after 0:03")


def test_times_as_people_write_them() -> None:
    assert [clock(s) for s in (0.0, 59.6, 3599.0, 3600.0, 90061.0)] == [
        "0:00", "1:00", "59:59", "1:00:00", "25:01:01",
    ]  # fmt: skip


def cheap(sample: dict[str, Any]) -> None:
    """A trial of no training; those that run muon in the upper half fail."""
    from ray import tune

    for step in (1, 2):
        if step == 2 and sample[LR] > 0.5 and sample[TYPE] == "muon":
            raise RuntimeError("as it was to be")
        tune.report({"loss": sample[LR] + 1 / step, "progress": step / 2, "tokens": step})


def sweep(folder: Path) -> AxSearcher:
    from ray import tune

    searcher = AxSearcher(SPACE, file=str(folder / "searcher.json"))
    watch = Watch(searcher, [])
    try:
        tune.Tuner(
            tune.with_resources(cheap, {"CPU": 0.5}),
            tune_config=tune.TuneConfig(
                search_alg=searcher, num_samples=4, max_concurrent_trials=2
            ),
            run_config=tune.RunConfig(
                name="tune",
                storage_path=str(folder),
                callbacks=[Clock(str(folder / "attempts.json")), watch],
                verbose=0,
            ),
        ).fit()
    finally:
        watch.close()
    return searcher


@pytest.mark.ray
def test_trials_of_tune_are_told_and_timed(
    ray_cluster: None, tmp_path: Path, capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """As lines; then another sweep on a terminal of its own, as a table that is drawn again."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not see tests
    searcher = sweep(tmp_path / "lines")
    out, found = capfd.readouterr().out, searcher.ended()
    assert len(found) == 4 and sum(each.status == "failed" for each in found) == 1
    for each in found:
        why = " (RuntimeError: as it was to be)" if each.status == "failed" else ""
        assert f"trial {each.index} {each.status}{why} at " in out
    [best] = searcher.front()
    assert f"4 of 4 trials ended; none runs; best {best.index} (loss" in out
    assert "Trial status" not in out and "View detailed" not in out and "\x1b" not in out
    spans = read_spans(str(tmp_path / "lines" / "attempts.json"))
    assert set(spans) == {trial_name(each.overrides) for each in found}
    for [begin, end] in (attempts[0] for attempts in spans.values()):
        assert 0 < end - begin < 300

    shown = on_a_terminal(lambda: sweep(tmp_path / "table"), monkeypatch)
    assert "optimizer.lr" in shown and "early" not in shown and shown.count("tokens/s") >= 4
    assert "4 of 4 trials ended" in shown and shown.count("\x1b[1A") > 4, "drawn over itself"
    assert shown.rindex("\x1b[?25h") > shown.rindex("\x1b[?25l"), "the cursor is there again"


def on_a_terminal(work: Any, monkeypatch: pytest.MonkeyPatch) -> str:
    """What `work` writes to a terminal of 200 columns."""
    main, side = pty.openpty()
    pieces: list[bytes] = []

    def read() -> None:
        while True:
            try:
                piece = os.read(main, 65536)
            except OSError:  # the other end was closed
                return
            if not piece:
                return
            pieces.append(piece)

    reader = threading.Thread(target=read)
    reader.start()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "200")
    with os.fdopen(side, "w") as terminal, monkeypatch.context() as changed:
        changed.setattr(sys, "stdout", terminal)
        work()
    reader.join(timeout=30)
    os.close(main)
    return b"".join(pieces).decode()


def test_a_clock_goes_on_where_it_was(tmp_path: Path) -> None:
    file = str(tmp_path / "attempts.json")
    Path(file).write_text(json.dumps({"a": [[1.0, 2.0]]}))
    assert Clock(file).spans == {"a": [[1.0, 2.0]]}
    assert Clock(str(tmp_path / "none.json")).spans == {}

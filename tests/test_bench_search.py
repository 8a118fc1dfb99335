"""Benchmarks of searches tell their figures as JSON too."""

import json
from pathlib import Path

import bench_search
import bench_sweep
import pytest


def test_figures_of_early_stopping(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["bench_search.py", "--asha", "--trials", "6", "--seeds", "2", "--json"]
    monkeypatch.setattr("sys.argv", words)
    bench_search.main()
    [found] = json.loads(capsys.readouterr().out)
    assert len(found["cost"]) == len(found["worse"]) == 2
    assert all(0 < share < 1 for share in found["cost"]) and min(found["worse"]) >= 0


def test_what_lies_between_trials_by_hand(tmp_path: Path) -> None:
    """Four of 10 s on two slots take 20 s at best; here the last ends after 25."""
    for n, (begin, end) in enumerate([(0, 10), (0, 10), (12, 22), (15, 25)]):
        line = {"timestamp": 100.0 + end, "time_total_s": float(end - begin)}
        (tmp_path / f"trial{n}").mkdir()
        (tmp_path / f"trial{n}" / "result.json").write_text(json.dumps(line) + "\n")
    told = bench_sweep.figures(bench_sweep.times(tmp_path))
    assert (told["wall"], told["ideal"], told["ratio"]) == (25, 20, 1.25)
    assert told["trials"][3] == [15, 25]

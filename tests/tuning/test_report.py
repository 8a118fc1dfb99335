"""The report of a sweep whose trials were counted by hand."""

import time
from pathlib import Path

import pytest
import yaml

from bitray import Config
from bitray.settings import UserError
from bitray.tuning import AxSearcher, SearchSpace
from bitray.tuning.sweep import analyze, outline

DEMO = Path(__file__).parents[2] / "search_spaces" / "demo.yaml"
LR = "stages.stage2.optimizer.lr"


def swept(folder: Path, **said: object) -> tuple[SearchSpace, list[dict]]:
    """Four trials, the third of them the best, the last one stopped early."""
    told = {**yaml.safe_load(DEMO.read_text()), "num_trials": 4, "sobol_trials": 4, **said}
    (folder / "space.yaml").write_text(yaml.safe_dump(told))
    space = SearchSpace.load(str(folder / "space.yaml"))
    searcher, samples = AxSearcher(space, file=str(folder / "searcher.json")), []
    for n, loss in enumerate([3.0, 2.5, 2.0, 1.0]):
        while (sample := searcher.suggest(str(n))) is None:
            time.sleep(0.02)
        samples.append(sample)
        result = {"loss": loss, "steps": 10.0 * n, "progress": 1.0 if n < 3 else 0.5}
        searcher.on_trial_complete(str(n), result)
    searcher.settle()
    return space, samples


def test_the_best_configuration_is_ready_to_run(tmp_path: Path) -> None:
    space, samples = swept(tmp_path)
    told = analyze(space, str(tmp_path))
    assert "4 trials: 3 completed, 1 early_stopped" in told and "trial 2: loss 2" in told
    best = Config.load(str(tmp_path / "best.yaml"))
    assert best.stages["stage2"].optimizer.lr == samples[2][LR]
    assert best.stages["stage2"].max_steps == 30
    lines = (tmp_path / "report.md").read_text().splitlines()
    assert sum(f"{sample[LR]:.4g}" in line for line in lines for sample in samples) >= 4


def test_of_two_objectives_a_front_is_told(tmp_path: Path) -> None:
    space, _ = swept(tmp_path, objectives={"loss": "minimize", "steps": "minimize"})
    analyze(space, str(tmp_path))
    assert {path.name for path in tmp_path.glob("best*")} == {f"best_{n}.yaml" for n in range(3)}


def test_there_has_to_be_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no sweep"):
        analyze(SearchSpace.load(str(DEMO)), str(tmp_path))


def test_a_dry_run_tells_what_it_would_cost() -> None:
    told = outline(SearchSpace.load(str(DEMO)))
    row = 256 * 8
    assert f"8 trials, 5 of them spread evenly, of up to {40 * row:,} tokens each" in told
    assert f"({8 * 40 * row:,} in all)" in told and LR in told

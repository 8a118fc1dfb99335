"""The report of a sweep whose trials were counted by hand."""

import json
import math
import re
import time
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml

from bitray import Config, storage
from bitray.settings import UserError
from bitray.tuning import AxSearcher, SearchSpace
from bitray.tuning.cost import cost_table
from bitray.tuning.experiment import as_json, client_of, importance
from bitray.tuning.parameter import labels
from bitray.tuning.pictures import best_so_far, curves, fence
from bitray.tuning.report import Sweep, optimizer_tables
from bitray.tuning.searcher import Found, front
from bitray.tuning.sweep import analyze, outline
from bitray.tuning.trial import trial_config, trial_name

DEMO = Path(__file__).parents[2] / "search_spaces" / "demo.yaml"
LR = "stages.stage2.optimizer.lr"
ROW = 256 * 8
"""Tokens of a step of the demo's stages."""
ENDS = ("completed", "completed", "completed", "early_stopped", "failed")


def space_of(folder: Path, **said: object) -> SearchSpace:
    told = {**yaml.safe_load(DEMO.read_text()), "num_trials": 5, "sobol_trials": 5, **said}
    (folder / "given.yaml").write_text(yaml.safe_dump(told))
    return SearchSpace.load(str(folder / "given.yaml"))


def swept(folder: Path, **said: object) -> list[dict]:
    """A sweep's folder with five trials: the third is the best, the fourth was stopped early, the
    last one failed at its second attempt."""
    space = space_of(folder, **said)
    searcher, samples = AxSearcher(space, file=str(folder / "searcher.json")), []
    storage.write_text(str(folder / "space.yaml"), space.dump())
    spans = {}
    for n, loss in enumerate([3.0, 2.5, 2.0, 1.0, math.nan]):
        while (sample := searcher.suggest(str(n))) is None:
            time.sleep(0.02)
        samples.append(sample)
        told = {"loss": loss, "steps": 10.0 * n, "progress": 1.0 if n < 3 else 0.5}
        searcher.on_trial_complete(str(n), None if n == 4 else told, error=n == 4)
        spans[trial_name(sample)] = [[1000.0, 1000.0 + 360 * (n + 1)]]
        run_dir = trial_config(space.config(), str(folder / "common"), sample).run_dir
        lines = [
            {"stage": "stage1_9", "step": 10, "eval/a_loss": 4.0, "eval/b_loss": 6.0},
            {"stage": "stage2", "step": 15, "eval/a_loss": loss if n < 4 else "nan"},
        ]
        cost = {"train/seconds": 60.0, "train/peak_memory_gb": 1.0}
        text = "".join(json.dumps(line | cost) + "\n" for line in lines[: 2 if n != 3 else 1])
        storage.write_text(f"{run_dir}/metrics.jsonl", text)
        storage.write_json(f"{run_dir}/evaluations.json", {"stage1": {"a": 7.0, "b": 7.0}})
    spans[trial_name(samples[4])].append([3000.0, 3720.0])
    storage.write_json(str(folder / "attempts.json"), spans)
    searcher.settle()
    return samples


# ----------------------------------------------------------------------------------------- folder


def test_the_best_configuration_is_ready_to_run(tmp_path: Path) -> None:
    samples = swept(tmp_path)
    told = analyze(str(tmp_path))
    assert "5 trials: 3 completed, 1 early_stopped, 1 failed" in told and "trial 2: loss 2" in told
    best = Config.load(str(tmp_path / "best.yaml"))
    assert best.stages["stage2"].optimizer.lr == samples[2][LR]
    assert best.stages["stage2"].max_steps == 30
    assert best.experiment == f"{tmp_path.name}_best", "neither the sweep's folder nor the demo's"
    lines = (tmp_path / "report.md").read_text().splitlines()
    for n, sample in enumerate(samples):
        [row] = [line.split() for line in lines if line.endswith(trial_name(sample))]
        assert row[:2] == [str(n), ENDS[n]] and f"{sample[LR]:.4g}" in row
        assert row[-2] == f"{360.0 * (n + 1) + (720 if n == 4 else 0):.4g}"


def test_of_two_objectives_a_front_is_told(tmp_path: Path) -> None:
    swept(tmp_path, objectives={"loss": "minimize", "steps": "minimize"})
    (tmp_path / "best_3.yaml").write_text("of an earlier front")
    analyze(str(tmp_path))
    assert {path.name for path in tmp_path.glob("best*")} == {f"best_{n}.yaml" for n in range(3)}
    assert "## Pareto front" in (tmp_path / "report.md").read_text()
    page = (tmp_path / "report.html").read_text()
    assert "Pareto front: steps against loss" in page and "Optimisation trace: steps" in page


def test_the_report_is_written_again_to_the_byte(tmp_path: Path) -> None:
    swept(tmp_path, num_trials=5)
    analyze(str(tmp_path))
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.*")}
    assert {"report.md", "report.html", "best.yaml", "space.yaml"} <= set(before)
    for name in ("report.md", "report.html", "best.yaml"):
        (tmp_path / name).unlink()
    analyze(str(tmp_path))
    assert {path.name: path.read_bytes() for path in tmp_path.glob("*.*")} == before


class Checked(HTMLParser):
    """Which elements were opened and not closed, and what the page refers to."""

    VOID = ("meta", "link", "br", "img", "input", "hr")

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.wrong: list[str] = []
        self.refers: list[str] = []
        self.ids: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in self.VOID:
            self.open.append(tag)
        self._look(attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._look(attrs)

    def _look(self, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name in ("href", "xlink:href", "src", "srcset", "action"):
                self.refers.append(value or "")
            if name == "id":
                self.ids.add(value or "")
            self.refers += re.findall(r"url\(([^)]*)\)", value or "")

    def handle_endtag(self, tag: str) -> None:
        if not self.open or self.open.pop() != tag:
            self.wrong.append(tag)


def test_the_page_is_whole_and_needs_nothing_else(tmp_path: Path) -> None:
    folder = tmp_path / "<script>alert('x') & co"
    folder.mkdir()
    swept(folder)
    analyze(str(folder))
    page = (folder / "report.html").read_text()
    found = Checked(page)
    assert not found.wrong and not found.open
    for target in found.refers:
        assert target.startswith("data:") or target.removeprefix("#") in found.ids, target
    assert "<script" not in page and "&lt;script&gt;alert" in page and "@import" not in page
    assert page.count("<svg") == 3  # trace, curves, parallel coordinates
    for title in ("Optimisation trace: loss", "Held-out loss of all trials", "Cost of the trials",
                  "Parallel coordinates", "Configuration of trial 2"):  # fmt: skip
        assert title in page


def test_a_sweep_knows_what_it_searches(tmp_path: Path) -> None:
    """Words of the command line, budgets and all of the run are in `space.yaml`."""
    space = SearchSpace.load(str(DEMO), ["stages.stage2.max_steps=44", "seed=7"])
    again = SearchSpace.load_text(space.dump(), "there")
    assert again.config().model_dump() == space.config().model_dump()
    assert again.config().stages["stage2"].max_steps == 44 and again.seed == 7
    said = {"run", "budget"}
    assert again.model_dump(exclude=said) == space.model_dump(exclude=said)


def test_there_has_to_be_a_sweep(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no sweep; .*searcher.json is missing"):
        analyze(str(tmp_path))


def test_a_dry_run_tells_what_it_would_cost() -> None:
    told = outline(SearchSpace.load(str(DEMO)))
    assert f"8 trials, 5 of them spread evenly, of up to {40 * ROW:,} tokens each" in told
    assert f"({8 * 40 * ROW:,} in all)" in told and LR in told


# ---------------------------------------------------------------------------------- known values


def ended(index: int, status: str = "completed", **metrics: float) -> Found:
    return Found(index, {LR: 1e-3 * (index + 1)}, status, metrics)


def test_a_front_by_hand(tmp_path: Path) -> None:
    """Of (loss down, rate up): 1 is beaten by 0 in both, 4 by 2 in one, equal ones both stay."""
    space = space_of(
        tmp_path,
        objectives={"loss": "minimize", "tokens_per_second": "maximize"},
        outcome_constraints=["peak_memory_gb <= 2"],
    )
    points = [(2.0, 10.0), (2.1, 9.0), (1.5, 5.0), (3.0, 20.0), (1.6, 5.0), (2.0, 10.0)]
    trials = [
        ended(n, loss=loss, tokens_per_second=rate, peak_memory_gb=1.0)
        for n, (loss, rate) in enumerate(points)
    ]
    trials += [
        ended(6, "early_stopped", loss=0.1, tokens_per_second=99.0, peak_memory_gb=1.0),
        ended(7, loss=0.1, tokens_per_second=99.0, peak_memory_gb=3.0),
    ]
    assert [each.index for each in front(space, trials)] == [0, 2, 3, 5]


def test_the_best_so_far_by_hand(tmp_path: Path) -> None:
    losses = [3.0, 3.5, 1.0, 2.0, 2.5]
    ends = ["completed", "completed", "early_stopped", "completed", "completed"]
    trials = [
        ended(n, end, loss=v) for n, (v, end) in enumerate(zip(losses, ends, strict=True))
    ] + [ended(5, "failed")]
    expected = [(0, 3.0), (1, 3.0), (3, 2.0), (4, 2.0), (5, 2.0)]
    assert best_so_far(space_of(tmp_path), trials, "loss") == expected
    upwards = space_of(tmp_path, objectives={"loss": "maximize"})
    assert [value for _, value in best_so_far(upwards, trials, "loss")] == [3.0, 3.5, 3.5, 3.5, 3.5]
    assert best_so_far(upwards, trials[2:3], "loss") == []


@pytest.mark.parametrize(
    ("words", "kind", "held"),
    [
        (["scaling.num_workers=3"], "worker", 3),
        (["scaling=single_gpu"], "GPU", 1),
        (["scaling=fsdp_multi", "stages.stage1_9.scaling.num_workers=1"], "GPU", 4),
        (["scaling=single_gpu", "scaling.gpus_per_worker=0.25"], "GPU", 0.25),
        (
            [
                "scaling=single_gpu",
                "model.teacher={type: actors, count: 2, gpus: 0.5}",
                "stages.stage1_9.objectives.hidden_distill=null",
            ],
            "GPU",
            2,
        ),
    ],
)
def test_hours_by_hand(words: list[str], kind: str, held: float) -> None:
    """Attempts that were cut off count, trials that were not timed are told."""
    trials = [ended(0), ended(1), ended(2, "failed"), ended(3, "early_stopped")]
    spans = {
        trial_name(trials[0].overrides): [[0.0, 1800.0]],
        trial_name(trials[1].overrides): [[0.0, 900.0], [5000.0, 8600.0]],
        trial_name(trials[2].overrides): [[10.0, 46.0]],
        "another": [[0.0, 3600.0]],
    }
    table = cost_table(Config.load(overrides=words), trials, spans)
    assert table.header[-1] == f"{kind}-hours"
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["completed"] == ["2", "1.75", f"{1.75 * held:.4g}"]
    assert rows["failed"] == ["1", "0.01", f"{0.01 * held:.4g}"]
    assert rows["early_stopped"] == ["1", "0 (1 not recorded)", "0"]
    assert rows["not ended"] == ["1", "1", f"{1.0 * held:.4g}"]
    assert rows["all"] == ["5", "2.76 (1 not recorded)", f"{2.76 * held:.4g}"]


def test_optimizers_side_by_side(tmp_path: Path) -> None:
    kind = "stages.stage2.optimizer.type"
    space = space_of(
        tmp_path,
        parameters={kind: {"choice": ["adamw", "muon"]}, LR: {"loguniform": [1e-3, 8e-3]}},
        start=[],
    )
    losses = {"adamw": [3.0, 2.0, 2.5, 7.0], "muon": [1.0, 4.0]}
    trials = [
        Found(n, {kind: name, LR: 1e-3}, "completed" if loss < 7 else "abandoned", {"loss": loss})
        for n, (name, loss) in enumerate((k, v) for k, each in losses.items() for v in each)
    ]
    [(title, table)] = optimizer_tables(space, trials).items()
    assert title == "By optimizer.type"
    assert list(table.header) == ["type", "trials", "completed", "best loss", "median loss"]
    assert table.rows == [["adamw", "4", "3", "2", "2.5"], ["muon", "2", "2", "1", "2.5"]]


def test_importance_of_a_function_of_one_parameter() -> None:
    """All of it depends on `x.a`, with which it falls; on the other two nothing does."""
    text = yaml.safe_dump(
        {
            "parameters": {
                "x.a": {"loguniform": [1e-3, 1e-1]},
                "x.b": {"uniform": [0.0, 1.0]},
                "x.kind": {"choice": ["one", "two", "three"]},
            },
            "objectives": {"loss": "minimize"},
            "num_trials": 12,
            "sobol_trials": 10,
        }
    )
    space = SearchSpace.load_text(text, "here")
    client = client_of(space)
    for done in range(12):
        [(index, point)] = client.get_next_trials(1).items()
        client.complete_trial(index, {"loss": -point["x__a"]})
        if done == 2:
            shares, told = importance(as_json(client), space, 3)
            assert shares == {} and "too few trials, 3 of the 6" in told
    shares, told = importance(as_json(client), space, 12)
    assert set(shares["loss"]) == {"x.a", "x.b", "x.kind"}
    assert shares["loss"]["x.a"] < -0.9 and sum(map(abs, shares["loss"].values())) <= 1.001
    assert "R2" in told
    assert importance(as_json(client), space, 12) == (shares, told), "drawn from the same seed"


def test_curves_of_a_trial_by_hand(tmp_path: Path) -> None:
    swept(tmp_path)
    space = SearchSpace.load(str(tmp_path / "given.yaml"))
    searcher = AxSearcher(space, file=str(tmp_path / "searcher.json"))
    sweep = Sweep.read(str(tmp_path), space, space.config(), searcher)
    assert sweep.curve(sweep.trials[0]) == [(10 * ROW, 5.0), (25 * ROW, 3.0)]
    assert sweep.curve(sweep.trials[3]) == [(10 * ROW, 5.0)]


def test_a_trial_that_diverges_does_not_hide_the_others() -> None:
    """Quartiles of 1..9 are 3 and 7: the fence is at 7 + 3 * 4."""
    assert fence([*map(float, range(1, 10))]) == 19
    assert fence([1.0, 2.0, 300.0]) == 300
    fine = [Found(n, {}, "completed", {}) for n in range(4)]
    flat = {n: [(10, 5.0 - n / 10), (20, 4.0 - n / 10)] for n in range(4)}
    assert "left out" not in curves(flat, fine, [])
    assert "(what is above" in curves({**flat, 3: [(10, 4.7), (20, 328.0)]}, fine, [])


def test_labels_are_short_and_tell_apart() -> None:
    paths = ["stages.stage1_9.optimizer.lr", LR, "stages.stage2.saliency.enabled", "depth"]
    assert list(labels(paths).values()) == [
        "stage1_9.optimizer.lr", "stage2.optimizer.lr", "saliency.enabled", "depth",
    ]  # fmt: skip

"""Search spaces: those that come with bitray, points and settings, and what is refused."""

import math
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bitray.settings import UserError
from bitray.tuning import SearchSpace
from bitray.tuning.experiment import client_of
from bitray.tuning.linear import linear

SPACES = sorted((Path(__file__).parents[2] / "search_spaces").glob("*.yaml"))
LR, LR19 = "stages.stage2.optimizer.lr", "stages.stage1_9.optimizer.lr"
SALIENCY = "stages.stage2.saliency_curriculum"
GOOD = {
    "parameters": {
        LR19: {"loguniform": [1e-3, 8e-3]},
        LR: {"loguniform": [1e-3, 8e-3]},
        f"{SALIENCY}.enabled": {"choice": [False, True]},
        f"{SALIENCY}.initial_k": {"ordered": [0.05, 0.1], "when": {f"{SALIENCY}.enabled": True}},
    },
    "constraints": [f"{LR} <= 2 * {LR19}"],
    "objectives": {"loss": "minimize"},
    "outcome_constraints": ["peak_memory_gb <= 20"],
    "budget": {"stage2": {"steps": 50}},
}


def written(folder: Path, **changes) -> str:
    path = folder / "space.yaml"
    path.write_text(yaml.safe_dump({**GOOD, **changes}))
    return str(path)


def corners(space: SearchSpace):
    """Points at the bounds and in the middle that constraints may or may not allow."""
    for at in (0.0, 0.5, 1.0):
        values = {}
        for path, each in space.searched().items():
            low, high = each.bounds or (0, 0)
            inner = low * (high / low) ** at if each.loguniform else low + at * (high - low)
            found = each.values[int(at * (len(each.values) - 1))] if each.values else inner
            values[path] = round(found) if each.int else found
        yield space.point(values)


@pytest.mark.parametrize("path", SPACES, ids=lambda path: path.stem)
def test_every_space_loads_and_its_points_are_runs(path: Path) -> None:
    space = SearchSpace.load(str(path))
    config = space.config()
    assert path.read_text().startswith("# ")
    client_of(space)  # Ax takes it
    for point in corners(space):
        said = space.overrides(point)
        if min(v for v in said.values() if not isinstance(v, str)) >= 0:  # no derived below 0
            config.override(said)
    fixed = {path: each.fixed for path, each in space.parameters.items() if each.kind == "fixed"}
    for start in space.start:
        assert space.overrides(space.point(start)) == pytest.approx({**fixed, **start})


def test_optimizers_differ_in_what_they_are_asked_alone() -> None:
    """Setting a type resets the others' settings: no weight decay has to be said of all. Each has
    parameters of its own, and the baseline without a teacher is a run."""
    space = SearchSpace.load(str(next(p for p in SPACES if p.stem == "optimizers")))
    config, kind = space.config(), "stages.stage2.optimizer.type"
    for name in space.parameters[kind].values:
        own = [
            path
            for path, each in space.parameters.items()
            if each.condition and name in each.condition[1]
        ]
        said = space.parameters["stages.stage2.optimizer.weight_decay"].fixed
        run = config.override({kind: name, "stages.stage2.optimizer.weight_decay": said})
        assert own and run.stages["stage2"].optimizer.weight_decay == 0
    plain = config.override({"stages.stage2.objectives.logits_distill.weight": 0})
    assert config.stages["stage2"].needs_teacher and not plain.stages["stage2"].needs_teacher


def test_stage_2_does_not_decay_weights() -> None:
    space = SearchSpace.load(str(next(p for p in SPACES if p.stem == "stage1_9_stage2")))
    optimizer = space.config().stages["stage2"].optimizer
    assert (optimizer.type, optimizer.weight_decay) == ("muon", 0)


def test_there_are_spaces() -> None:
    assert len(SPACES) >= 6


def test_budgets_and_words_reach_the_run(tmp_path: Path) -> None:
    space = SearchSpace.load(written(tmp_path), ["num_trials=15", "stages.stage2.batch_size=2"])
    stage = space.config().stages["stage2"]
    assert (space.num_trials, stage.max_steps, stage.batch_size) == (15, 50, 2)


def test_budgets_are_of_the_stages_that_words_choose(tmp_path: Path) -> None:
    """Other stages take the place of the file's, and are as long as its budgets say."""
    words = ["pipeline=demo", "stages.stage1_9.lambda_warmup.warmup_steps=5"]
    config = SearchSpace.load(written(tmp_path), words).config()
    assert list(config.stages) == ["stage0", "stage1", "stage1_9", "stage2"]
    assert config.stages["stage2"].total_steps == 50


@settings(deadline=None, max_examples=30)
@given(st.floats(-3, math.log10(8e-3)), st.floats(-3, math.log10(8e-3)), st.booleans())
def test_points_and_settings_are_one_another_s_inverse(a: float, b: float, saliency: bool) -> None:
    space = SearchSpace.load_text(yaml.safe_dump(GOOD), "here")
    point = {
        "stages__stage1_9__optimizer__lr": a,
        "stages__stage2__optimizer__lr": b,
        "stages__stage2__saliency_curriculum__enabled": saliency,
        **({"stages__stage2__saliency_curriculum__initial_k": 0.1} if saliency else {}),
    }
    said = space.overrides(point)
    assert 1e-3 <= said[LR] <= 8e-3 and said[LR] == pytest.approx(10**b)
    assert (f"{SALIENCY}.initial_k" in said) == saliency
    assert space.point(said) == pytest.approx(point)
    [(row, bound)] = space.inequalities()
    slack = bound - sum(c * math.log10(said[p]) for p, c in row.items())
    assert slack == pytest.approx(math.log10(2 * said[LR19] / said[LR]))


def test_what_matters_with_several_values_is_one_parameter() -> None:
    """Ax knows trees alone: it has a parameter below each value, we have one setting."""
    deep = {"uniform": [0.0, 1.0], "when": {"x.kind": ["b", "c"]}}
    told = {
        "parameters": {
            "x.kind": {"choice": ["a", "b", "c"]},
            "x.mode": {"choice": [1, 2], "when": {"x.kind": ["b", "c"]}},
            "x.deep": deep,
            "x.deeper": {"uniform": [0.0, 1.0], "when": {"x.mode": 2}},
        },
        "objectives": {"loss": "minimize"},
    }
    space = SearchSpace.load_text(yaml.safe_dump(told), "here")
    assert space.names("x.deeper") == {"x__deeper__b", "x__deeper__c"}
    client, found = client_of(space), []
    for _ in range(12):
        [(index, point)] = client.get_next_trials(1).items()
        said = space.overrides(point)
        assert space.point(said) == point
        assert ("x.deep" in said) == ("x.mode" in said) == (said["x.kind"] != "a")
        assert ("x.deeper" in said) == (said.get("x.mode") == 2)
        found.append(said["x.kind"])
        client.complete_trial(index, {"loss": said.get("x.deep", 0.5)})
    assert set(found) == {"a", "b", "c"}


def test_a_derived_weight_takes_what_is_left(tmp_path: Path) -> None:
    space = SearchSpace.load(str(next(p for p in SPACES if p.stem == "data_mixture")))
    said = space.overrides(
        {"data__sources__code__weight": 0.5, "data__sources__prose__weight": 0.3}
    )
    assert said["data.sources.arithmetic.weight"] == pytest.approx(0.2)
    said = space.overrides(  # Ax gives such: its own sum is a little above 1
        {"data__sources__code__weight": 0.4 + 7.8e-9, "data__sources__prose__weight": 0.6}
    )
    assert said["data.sources.arithmetic.weight"] == 0
    assert space.config().override(said)


def test_what_is_derived_of_a_rate_lies_between_its_ends() -> None:
    told = {
        "parameters": {
            "x.rate": {"loguniform": [1e-3, 1e-1]},
            "x.share": {"uniform": [0.0, 1.0]},
            "x.rest": {"derived": "1 - 2 * x.rate - x.share"},
        },
        "constraints": ["x.share <= 0.5"],
        "objectives": {"loss": "minimize"},
    }
    space = SearchSpace.load_text(yaml.safe_dump(told), "here")
    assert space.extremes(linear("1 - 2 * x.rate - x.share")) == pytest.approx((0.3, 0.998))
    assert space.overrides({"x__rate": -2.0, "x__share": 0.25})["x.rest"] == pytest.approx(0.73)


RATE = {LR: {"loguniform": [1e-3, 8e-3]}}
BAD = {
    "a path with a typo": (
        {"parameters": {"stages.stage2.optimzer.lr": {"uniform": [1e-3, 2e-3]}}},
        r"optimzer.*no such setting \(nearest: 'optimizer'\)",
    ),
    "a stage that is not there": (
        {"parameters": {"stages.stge2.optimizer.lr": {"uniform": [1e-3, 2e-3]}}},
        r"stages\.stge2.*nearest: 'stage2'.*line \d",
    ),
    "a source that is not there": (
        {"parameters": {"data.sources.cod.weight": {"uniform": [0.1, 1.0]}}},
        r"data\.sources\.cod:.*nearest: 'code'",
    ),
    "reversed bounds": ({"parameters": {LR: {"loguniform": [1e-2, 1e-3]}}}, r"0.01 is not below"),
    "a logarithm below 0": ({"parameters": {LR: {"loguniform": [-1e-3, 1e-2]}}}, r"-0.001 has no"),
    "a logarithm of 0": ({"parameters": {LR: {"loguniform": [0.0, 1e-3]}}}, r"has no logarithm"),
    "an illegal bound": ({"parameters": {LR: {"uniform": [-1.0, 1e-3]}}}, r"greater than 0"),
    "halves of a whole number": (
        {"parameters": {"stages.stage2.batch_size": {"uniform": [1, 8]}}},
        r"batch_size.*integer",
    ),
    "a choice that is not legal": (
        {"parameters": {**RATE, "stages.stage2.optimizer.type": {"choice": ["adamw", "moun"]}}},
        r"'moun' is not one of .*nearest: 'muon'",
    ),
    "two kinds": ({"parameters": {LR: {"uniform": [1, 2], "int": [1, 2]}}}, r"uniform and int"),
    "an unknown kind": (
        {"parameters": {LR: {"lognormal": [1e-3, 1e-2]}}},
        r"no such setting \(nearest: 'loguniform'\)",
    ),
    "a constraint on a choice": (
        {"constraints": [f"{SALIENCY}.enabled <= 1"]},
        r"is choice; only uniform",
    ),
    "a constraint on what is conditional": (
        {"constraints": [f"{SALIENCY}.initial_k <= 1"]},
        r"is ordered; only uniform",
    ),
    "a sum of rates": ({"constraints": [f"{LR} + {LR19} <= 0.01"]}, r"logarithm in which"),
    "a constraint on no parameter": (
        {"constraints": [f"{LR}x <= 1"]},
        r"is no parameter \(nearest: 'stages.stage2.optimizer.lr'\)",
    ),
    "constraints that leave nothing": ({"constraints": [f"log10({LR}) >= 0"]}, r"no point"),
    "an objective that no trial reports": (
        {"objectives": {"los": "minimize"}},
        r"no trial reports los \(nearest: 'loss'\)",
    ),
    "an outcome that no trial reports": (
        {"outcome_constraints": ["peak_memory <= 3"]},
        r"no trial reports peak_memory \(nearest: 'peak_memory_gb'\)",
    ),
    "an outcome constraint on the objective": ({"outcome_constraints": ["loss <= 3"]}, "itself"),
    "a direction": ({"objectives": {"loss": "minimise"}}, r"nearest: 'minimize'"),
    "no trials": ({"num_trials": 0}, r"num_trials.*greater than or equal to 1"),
    "more Sobol trials than trials": ({"num_trials": 8}, r"sobol_trials: 12 is more than"),
    "more parameters than trials": (
        {"num_trials": 3, "sobol_trials": 2},
        r"num_trials: 3 is too few for 4 parameters",
    ),
    "a stage longer than its budget": (
        {"parameters": {"stages.stage2.max_steps": {"int": [10, 100]}}},
        r"100 is more than budget.stage2, 50 steps",
    ),
    "more trials than points": (
        {
            "parameters": {
                f"{SALIENCY}.enabled": {"choice": [False, True]},
                f"{SALIENCY}.initial_k": {
                    "ordered": [0.05, 0.1],
                    "when": {f"{SALIENCY}.enabled": True},
                },
                "stages.stage2.batch_size": {"int": [1, 2]},
            },
            "num_trials": 12,
        },
        r"num_trials: 12 is more than the 6 points of the space",
    ),
    "a run without training": (
        {
            "run": {"groups": {"model": "demo", "data": "embedded", "training": "stage1_subln"}},
            "budget": {},
        },
        r"run: no stage trains a ternary model",
    ),
    "a stage that trials share": (
        {"parameters": {"stages.stage0.optimizer.lr": {"uniform": [1e-3, 1e-2]}}},
        r"stage0\.optimizer\.lr: no trial trains this stage; they train stage1_9, stage2",
    ),
    "a model that trials share": (
        {"parameters": {**RATE, "model.quantization.subln": {"choice": ["paper", "none"]}}},
        r"model\.quantization\.subln: all trials share the model of stage stage1",
    ),
    "a setting that is not of the trial": (
        {"parameters": {**RATE, "logging.wandb.group": {"choice": ["a", "b"]}}},
        r"logging\.wandb\.group: it changes nothing that a trial reports",
    ),
    "two kinds of early stopping": (
        {"run": {"stages": {"stage2": {"early_stopping": {"enabled": True}}}}},
        r"stage2\.early_stopping\.enabled: trials end early by the sweep's scheduler alone",
    ),
    "early stopping as a choice": (
        {"parameters": {**RATE, "stages.stage2.early_stopping.enabled": {"choice": [False, True]}}},
        r"early_stopping\.enabled: trials end early by the sweep's scheduler alone",
    ),
    "a group without a choice": (
        {"run": {"groups": "demo"}},
        r"groups \(.*\): takes choices by name, \{model: demo\}, not 'demo'",
    ),
    "a budget of no stage": ({"budget": {"stage9": {"steps": 5}}}, r"no such stage"),
    "a condition on no parameter": (
        {"parameters": {LR: {"uniform": [1e-3, 1e-2], "when": {LR19: 1}}}, "constraints": []},
        r"when: .* is no choice",
    ),
    "a condition on a value that is not there": (
        {
            "parameters": {
                f"{SALIENCY}.enabled": {"choice": [False, True]},
                LR: {"uniform": [1e-3, 1e-2], "when": {f"{SALIENCY}.enabled": 3}},
            }
        },
        r"3 is none of the values",
    ),
    "a start outside of the space": (
        {"start": [{LR: 1.0, LR19: 1e-3, f"{SALIENCY}.enabled": False}]},
        r"start\.0.*1\.0 lies outside",
    ),
    "half a start": (
        {"start": [{LR: 1e-3, f"{SALIENCY}.enabled": False}]},
        r"start\.0: stages.stage1_9.optimizer.lr has to be",
    ),
    "a field with a typo": ({"objective": {"loss": "minimize"}}, r"nearest: 'objectives'"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_sentence(tmp_path: Path, name: str) -> None:
    changes, message = BAD[name]
    if "parameters" in changes:
        changes = {"constraints": [], **changes}
    with pytest.raises(UserError) as caught:
        SearchSpace.load(written(tmp_path, **changes))

    assert re.search(message, str(caught.value)), str(caught.value)
    assert "\n" not in str(caught.value), str(caught.value)


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    parameters = {LR: {"uniform": [-1.0, 1.0]}, "stages.stage2.bach_size": {"int": [1, 2]}}
    with pytest.raises(UserError, match="3 problems"):
        SearchSpace.load(
            written(tmp_path, parameters=parameters, constraints=[], objectives={"los": "minimize"})
        )


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    written(tmp_path)
    with pytest.raises(UserError, match=r"no such file \(nearest: 'space.yaml'\)"):
        SearchSpace.load(str(tmp_path / "spce.yaml"))

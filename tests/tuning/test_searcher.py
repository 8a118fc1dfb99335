"""The searcher, called as Tune calls it, on functions that cost nothing."""

import copy
import json
import math
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.tune.search import Searcher

from bitray.settings import UserError
from bitray.tuning import AxSearcher, SearchSpace
from bitray.tuning.experiment import from_json

PLANE = {"x.a": {"uniform": [0.0, 1.0]}, "x.b": {"loguniform": [1e-3, 1e-1]}}
TREE = {
    **PLANE,
    "x.kind": {"choice": ["plain", "deep"]},
    "x.depth": {"ordered": [1, 2, 4], "when": {"x.kind": "deep"}},
}


def space(parameters: Any = None, **said: Any) -> SearchSpace:
    told = {
        "parameters": parameters or PLANE,
        "objectives": {"loss": "minimize"},
        "num_trials": 8,
        "sobol_trials": 8,
        **said,
    }
    return SearchSpace.load_text(yaml.safe_dump(told), "here")


def asked(searcher: AxSearcher, trial: str, patience: float = 200) -> Any:
    """What Tune gets by asking again until there is something."""
    end = time.monotonic() + patience
    while (sample := searcher.suggest(trial)) is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    return sample


def loss(sample: dict[str, Any]) -> float:
    return (sample["x.a"] - 0.3) ** 2 + (sample["x.b"] * 10 - 0.5) ** 2 + sample.get("x.depth", 0)


def told(sample: dict[str, Any], step: int, of: int = 3, **more: Any) -> dict[str, Any]:
    """A result as Tune passes it on: flat, with the configuration in it."""
    config = {f"config/{path}": value for path, value in sample.items()}
    value = loss(sample) + 1 - step / of
    return {"loss": value, "tokens": 100 * step, "progress": step / of, **config, **more}


def run_all(searcher: AxSearcher, prefix: str = "t", steps: int = 3) -> list[dict[str, Any]]:
    samples: list[dict[str, Any]] = []
    while (sample := asked(searcher, f"{prefix}{len(samples)}")) != Searcher.FINISHED:
        trial = f"{prefix}{len(samples)}"
        samples.append(sample)
        for step in range(1, steps):
            searcher.on_trial_result(trial, told(sample, step))
        searcher.on_trial_complete(trial, told(sample, steps))
    return samples


def ax_statuses(searcher: AxSearcher) -> dict[int, str]:
    searcher.settle()
    table = from_json(searcher.get_state()["ax"]).summarize()
    return dict(zip(table["trial_index"], table["trial_status"].str.lower(), strict=True))


def test_as_many_trials_as_asked_for_within_bounds_and_no_two_alike() -> None:
    searcher = AxSearcher(space(TREE, constraints=["x.a + 0.2 * log10(x.b) <= 0"]))
    samples = run_all(searcher)
    assert len({json.dumps(s) for s in samples}) == len(samples) == 8
    for sample in samples:
        assert 0 <= sample["x.a"] <= 1 and 1e-3 <= sample["x.b"] <= 1e-1
        assert sample["x.a"] + 0.2 * math.log10(sample["x.b"]) <= 1e-9
        assert ("x.depth" in sample) == (sample["x.kind"] == "deep")
    assert {s["x.kind"] for s in samples} == {"plain", "deep"}
    [best] = searcher.front()
    assert best.overrides == min(samples, key=loss)
    assert best.metrics["loss"] == pytest.approx(loss(best.overrides))


def test_points_to_start_from_come_first() -> None:
    start = [{"x.a": 0.25, "x.b": 0.05}, {"x.a": 0.5, "x.b": 0.001}]
    samples = run_all(AxSearcher(space(start=start, num_trials=4, sobol_trials=4)))
    assert samples[:2] == [pytest.approx(point) for point in start] and len(samples) == 4


def test_ends_are_told_apart() -> None:
    searcher = AxSearcher(space())
    ends: list[tuple[dict[str, Any] | None, bool, str]] = []
    samples = [asked(searcher, f"t{n}") for n in range(6)]
    ends = [
        (told(samples[0], 3), False, "completed"),
        (told(samples[1], 2, done=True), False, "early_stopped"),
        (told(samples[2], 2, loss=float("nan")), False, "abandoned"),
        (told(samples[3], 1, abandoned="out of memory"), False, "abandoned"),
        (told(samples[4], 2), True, "failed"),
        (None, True, "failed"),
    ]
    for n, (result, error, _) in enumerate(ends):
        searcher.on_trial_result(f"t{n}", told(samples[n], 1))
        searcher.on_trial_complete(f"t{n}", result, error)
    expected = {n: status for n, (_, _, status) in enumerate(ends)}
    assert {each.index: each.status for each in searcher.ended()} == expected
    known = ax_statuses(searcher)
    assert {n: known[n] for n in expected} == expected
    assert [each.index for each in searcher.front()] == [0]


def test_ax_knows_the_course_of_a_trial() -> None:
    searcher = AxSearcher(space())
    sample = asked(searcher, "t")
    for step in (1, 2):
        searcher.on_trial_result("t", told(sample, step))
    searcher.on_trial_complete("t", told(sample, 3))
    searcher.settle()
    table = from_json(searcher.get_state()["ax"])._experiment.lookup_data().full_df
    course = dict(zip(table["step"], table["mean"], strict=True))
    assert course == pytest.approx({100.0 * n: told(sample, n)["loss"] for n in (1, 2, 3)})


def test_the_same_calls_and_seed_give_the_same_points() -> None:
    first, again = run_all(AxSearcher(space(TREE))), run_all(AxSearcher(space(TREE)))
    assert first == again
    assert run_all(AxSearcher(space(TREE, seed=1))) != first


def test_several_objectives_and_outcome_constraints() -> None:
    searcher = AxSearcher(
        space(
            objectives={"loss": "minimize", "tokens_per_second": "maximize"},
            outcome_constraints=["peak_memory_gb <= 0.7"],
        )
    )
    points = {}
    for n in range(8):
        sample = asked(searcher, f"t{n}")
        a, b = sample["x.a"], sample["x.b"] * 10
        points[n] = (a**2 + b, a, b)
        metrics = {"loss": a**2 + b, "tokens_per_second": a, "peak_memory_gb": b}
        searcher.on_trial_complete(f"t{n}", {**metrics, "progress": 1.0})
    held = {n: p for n, p in points.items() if p[2] <= 0.7}
    expected = {
        n
        for n, (y, s, _) in held.items()
        if not any(y2 <= y and s2 >= s and (y2 < y or s2 > s) for y2, s2, _ in held.values())
    }
    assert {each.index for each in searcher.front()} == expected and len(held) < 8


def test_a_metric_that_is_not_reported_is_named() -> None:
    searcher = AxSearcher(space())
    asked(searcher, "t")
    with pytest.raises(UserError, match=r"did not report loss \(nearest: 'los'\)"):
        searcher.on_trial_complete("t", {"los": 1.0, "progress": 1.0})


def test_a_copy_at_any_moment_goes_on_alike(tmp_path: Any) -> None:
    whole = run_all(AxSearcher(space(TREE)))
    searcher = AxSearcher(space(TREE))
    for n in range(3):
        sample = asked(searcher, f"t{n}")
        assert sample == whole[n]
        searcher.on_trial_result(f"t{n}", told(sample, 1))
        searcher.on_trial_result(f"t{n}", told(sample, 2))
        searcher.on_trial_complete(f"t{n}", told(sample, 3))
    searcher.save(str(tmp_path / "state"))  # with events that Ax has not seen yet
    restored = AxSearcher(space(TREE))
    restored.restore(str(tmp_path / "state"))
    copied = pickle.loads(pickle.dumps(searcher))
    deep = copy.deepcopy(searcher)
    for each in (restored, copied, deep):
        assert run_all(each, "u") == whole[3:]
        assert len(each.ended()) == 8 and set(ax_statuses(each).values()) == {"completed"}


def test_a_driver_that_was_killed_begins_where_it_was(tmp_path: Any) -> None:
    """Whatever moment the file is of: no trial that ended is run again, and none is missing."""
    file = str(tmp_path / "searcher.json")
    killed = AxSearcher(space(), file=file)
    samples = [asked(killed, f"t{n}") for n in range(4)]
    killed.settle()
    told_so_far = json.loads(Path(file).read_text())
    coming = [("completed", 1, 3), ("result", 2, 1), ("result", 0, 2)]  # Ax does not know yet
    told_so_far["events"] += [
        killed._event(what, f"t{n}", told(samples[n], step)) for what, n, step in coming
    ]
    Path(file).write_text(json.dumps(told_so_far))
    again = AxSearcher(space(), file=file)
    again.hand_out_again()
    rest = run_all(again, "u")
    assert rest[:3] == [samples[0], *samples[2:]] and len(rest) == 7 and samples[1] not in rest
    assert [each.status for each in again.ended()] == ["completed"] * 8
    assert len(ax_statuses(again)) == 8


def test_failed_trials_are_tried_again_by_a_driver_that_starts_anew(tmp_path: Any) -> None:
    """In their own place: as many trials end as were asked for, and Ax knows how."""
    file = str(tmp_path / "searcher.json")
    searcher = AxSearcher(space(num_trials=4, sobol_trials=4), file=file)
    samples = [asked(searcher, f"t{n}") for n in range(4)]
    for n in range(4):
        searcher.on_trial_complete(f"t{n}", told(samples[n], 3), error=n in (1, 2))
    assert [each.status for each in searcher.ended()].count("failed") == 2
    again = AxSearcher(space(num_trials=4, sobol_trials=4), file=file)
    again.hand_out_again()
    assert [each.overrides for each in again.ended()] == [samples[0], samples[3]]
    rest = run_all(again, "t")  # Tune's names may come again
    assert sorted(map(str, rest)) == sorted(map(str, samples[1:3]))
    assert [each.status for each in again.ended()] == ["completed"] * 4
    assert list(ax_statuses(again).values()).count("completed") == 4


def test_more_trials_may_follow(tmp_path: Any) -> None:
    searcher = AxSearcher(space())
    run_all(searcher)
    searcher.save(str(tmp_path / "state"))
    more = AxSearcher(space(num_trials=10, sobol_trials=10))
    more.restore(str(tmp_path / "state"))
    assert len(run_all(more, "u")) == 2 and len(more.ended()) == 10


def test_restored_trials_with_other_ids_are_found_by_their_settings() -> None:
    searcher = AxSearcher(space())
    samples = [asked(searcher, f"t{n}") for n in range(3)]
    searcher.on_trial_complete("t0", None, True)  # to be started again
    searcher.on_trial_result("new0", told(samples[0], 2))
    searcher.on_trial_complete("new0", told(samples[0], 3))
    searcher.on_trial_complete("new1", told(samples[1], 3))  # it was running
    searcher.on_trial_complete("t2", None, True)
    searcher.on_trial_result("t2", told(samples[2], 1))  # the same one runs again
    searcher.on_trial_complete("t2", told(samples[2], 3))
    searcher.on_trial_complete("t2", told(samples[2], 3))  # told twice
    ended = searcher.ended()
    assert sorted(each.status for each in ended) == ["completed"] * 3 + ["failed"] * 2
    done = [each.overrides for each in ended if each.status == "completed"]
    assert sorted(map(str, done)) == sorted(map(str, samples))
    assert list(ax_statuses(searcher).values()).count("completed") == 3


def test_what_ax_refuses_reaches_the_caller() -> None:
    searcher = AxSearcher(space())
    asked(searcher, "t")
    searcher.settle()
    searcher._client = None  # as if Ax broke
    searcher.on_trial_result("t", told({"x.a": 0.1, "x.b": 0.1}, 1))
    with pytest.raises(AttributeError):
        searcher.settle()
    with pytest.raises(AttributeError):
        searcher.suggest("u")


def test_a_model_takes_over_and_nobody_waits_for_it() -> None:
    """After the Sobol points come BoTorch's, which do better; asking never blocks."""
    slowest, samples = 0.0, []
    searcher = AxSearcher(space(num_trials=7, sobol_trials=4, outcome_constraints=[]), ahead=1)
    while True:
        began = time.monotonic()
        sample = searcher.suggest(f"t{len(samples)}")
        searcher.get_state()
        slowest = max(slowest, time.monotonic() - began)
        if sample == Searcher.FINISHED:
            break
        if sample is None:
            time.sleep(0.05)
            continue
        searcher.on_trial_complete(f"t{len(samples)}", told(sample, 3))
        samples.append(sample)
    assert len(samples) == 7 and slowest < 1.5
    table = from_json(searcher.get_state()["ax"]).summarize()
    assert list(table["generation_node"]) == ["Sobol"] * 4 + ["MBM"] * 3
    assert min(map(loss, samples[4:])) < min(map(loss, samples[:4]))


def test_a_model_s_points_are_the_same_for_the_same_calls() -> None:
    said = {"num_trials": 6, "sobol_trials": 4}
    first, again = (run_all(AxSearcher(space(**said), ahead=0), steps=1) for _ in range(2))
    assert first == again and len(first) == 6

"""Projection onto bounds against independent solvers; rounding that keeps the bounds."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitray.data import project_to_bounds
from bitray.data.weights import UNIT, bounds_in_units, quantise
from bitray.settings import UserError

finite = st.floats(-5, 5, allow_nan=False)


def bisected(weights: np.ndarray, low: float, high: float) -> np.ndarray:
    """The dual variable by bisection: another way to the same point."""
    left, right = weights.min() - high - 1, weights.max() - low + 1
    for _ in range(200):
        middle = (left + right) / 2
        total = np.clip(weights - middle, low, high).sum()
        left, right = (middle, right) if total > 1 else (left, middle)
    return np.clip(weights - left, low, high)


@st.composite
def bounded(draw: st.DrawFn) -> tuple[np.ndarray, float, float]:
    weights = draw(st.lists(finite, min_size=1, max_size=12))
    low = draw(st.floats(0, 1)) / len(weights)
    high = 1 / len(weights) + draw(st.floats(0, 1)) * (1 - 1 / len(weights))
    return np.array(weights), low, high


@settings(deadline=None)
@example((np.array([0.0] * 3 + [1.0] * 6), 0.0, 1 / 9))
@given(bounded())
def test_projection_is_that_of_a_bisection_and_keeps_its_bounds(
    case: tuple[np.ndarray, float, float],
) -> None:
    weights, low, high = case
    found = project_to_bounds(weights, low, high)
    assert found.dtype == np.float64
    assert abs(found.sum() - 1) < 1e-12
    assert (found >= low).all() and (found <= high).all()  # exactly, not nearly
    np.testing.assert_allclose(found, bisected(weights, low, high), atol=1e-9)
    np.testing.assert_allclose(project_to_bounds(found, low, high), found, atol=1e-12)


def test_projection_is_the_nearest_point_by_alternating_projections() -> None:
    """Dykstra's algorithm between the box and the hyperplane: a third way to the same point."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        weights = rng.normal(0.2, 0.5, 6)
        point, correction = weights.copy(), np.zeros(6)
        for _ in range(2000):
            plane = point + (1 - point.sum()) / 6
            point = np.clip(plane + correction, 0.05, 0.6)
            correction += plane - point
        np.testing.assert_allclose(project_to_bounds(weights, 0.05, 0.6), point, atol=1e-9)


def test_a_dominant_weight_is_capped_where_clip_and_renormalise_would_break_the_cap() -> None:
    found = project_to_bounds(np.array([10.0, 0.1, 0.1]), 0.05, 0.6)
    np.testing.assert_allclose(found, [0.6, 0.2, 0.2], atol=1e-15)


@pytest.mark.parametrize(
    ("count", "low", "high"), [(3, 0.4, 1.0), (3, 0.0, 0.3), (2, 0.6, 0.5), (1, 0.0, 0.9)]
)
def test_bounds_that_cannot_be_met_are_refused_in_one_sentence(
    count: int, low: float, high: float
) -> None:
    with pytest.raises(UserError, match=f"{count} sources cannot all lie between"):
        project_to_bounds(np.ones(count), low, high)


def advised(count: int, low: float, high: float) -> tuple[float, float]:
    """The bounds that the refusal of others names; both who loads and who decides refuse."""
    for check in (
        lambda: bounds_in_units(count, low, high),
        lambda: quantise(dict.fromkeys(names(count), 1.0), names(count), low, high),
    ):
        with pytest.raises(UserError, match="in steps of 1/4096; take min_weight") as refused:
            check()
    said = str(refused.value).split()
    return float(said[said.index("up") + 2]), float(said[-2])


def names(count: int) -> list[str]:
    return [f"s{k}" for k in range(count)]


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10, 64])
def test_bounds_that_load_can_be_met_by_rounded_weights(count: int) -> None:
    """At the edge: one over the count is met only where it is a multiple of a weight's unit."""
    for edge in ((1 / count, 1.0), (0.0, 1 / count)):
        low, high = edge if UNIT % count == 0 else advised(count, *edge)
        assert bounds_in_units(count, low, high)[0] * count <= UNIT
        shares = quantise(dict.fromkeys(names(count), 1.0), names(count), low, high)
        assert sum(shares) == UNIT
        assert all(low <= share / UNIT <= high for share in shares)


def test_weights_that_are_not_finite_are_refused() -> None:
    with pytest.raises(UserError, match="finite"):
        project_to_bounds(np.array([0.5, np.nan]), 0.0, 1.0)


@settings(deadline=None)
@given(bounded())
def test_rounded_weights_sum_to_one_and_keep_the_bounds(
    case: tuple[np.ndarray, float, float],
) -> None:
    weights, low, high = case
    names = [f"s{k}" for k in range(len(weights))]
    high = max(high, (1 + len(weights) / UNIT) / len(weights))  # room for rounding
    low = min(low, max(0.0, (1 - len(weights) / UNIT) / len(weights)))
    shares = quantise(dict(zip(names, np.abs(weights) + 1e-3, strict=True)), names, low, high)
    assert sum(shares) == UNIT
    assert all(low - 1e-9 <= share / UNIT <= high + 1e-9 for share in shares)


def test_rounding_forgets_the_last_digits() -> None:
    names = ["a", "b", "c"]
    weights = {"a": 0.3, "b": 0.5, "c": 0.2}
    nudged = {name: weight * (1 + 1e-9) for name, weight in weights.items()}
    nudged["b"] *= 1 - 1e-9
    assert quantise(weights, names) == quantise(nudged, names)


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"a": 0.0, "b": 0.0}, "sum to zero"),
        ({"a": -0.1, "b": 1.0}, "weights.a: -0.1"),
        ({"a": float("nan")}, "weights.a: nan"),
        ({"cod": 1.0}, "no source 'cod' \\(nearest: 'code'\\)"),
    ],
)
def test_senseless_weights_are_named(weights: dict[str, float], said: str) -> None:
    with pytest.raises(UserError, match=said):
        quantise(weights, ["a", "b", "code"])

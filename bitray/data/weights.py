"""Weights of sources: projection onto bounds, rounding, and sharing out whole things by them."""

import math
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np
from jaxtyping import Float64

from bitray.settings import UserError, nearest

UNIT = 4096
"""Weights are multiples of 1 / UNIT, so that the last digits of a gradient, which differ between
numbers of workers, do not move rows."""


def apportion(demand: Sequence[Fraction], seats: int) -> tuple[int, ...]:
    """Share out `seats` in proportion to `demand`, exactly, by largest remainder."""
    total = sum(demand)
    exact = [seats * share / total for share in demand]
    given = [math.floor(share) for share in exact]
    left = seats - sum(given)
    order = sorted(range(len(exact)), key=lambda k: (given[k] - exact[k], k))
    for k in order[:left]:
        given[k] += 1
    return tuple(given)


def quantise(
    weights: Mapping[str, float],
    sources: Sequence[str],
    min_weight: float = 0.0,
    max_weight: float = 1.0,
) -> tuple[int, ...]:
    """Weights in multiples of 1 / UNIT that sum to UNIT and keep the bounds, in source order.

    They need not sum to one; a source that is not named gets nothing, whatever the bounds.
    `UserError` for unknown sources, weights that are negative or not finite, weights that are all
    zero, and bounds that cannot be met.
    """
    given = _checked(weights, sources)
    given /= given.sum()
    named = np.array([name in weights for name in sources])
    low, high = bounds_in_units(int(named.sum()), min_weight, max_weight)
    if low > 0 or high < UNIT:
        given[named] = project_to_bounds(given[named], low / UNIT, high / UNIT)
    return apportion([Fraction(float(weight)) for weight in given], UNIT)


def bounds_in_units(count: int, min_weight: float, max_weight: float) -> tuple[int, int]:
    """Bounds on the weights of `count` sources in multiples of 1 / UNIT: the widest within these.

    `UserError` if no such weights meet them.
    """
    low, high = math.ceil(min_weight * UNIT - 1e-9), math.floor(max_weight * UNIT + 1e-9)
    if not count * low <= UNIT <= count * high:
        raise UserError(_infeasible(count, min_weight, max_weight))
    return low, high


def _checked(weights: Mapping[str, float], sources: Sequence[str]) -> Float64[np.ndarray, " k"]:
    for name, weight in weights.items():
        if name not in sources:
            raise UserError(
                f"weights: there is no source '{name}'{nearest(name, sources)}; "
                f"there are: {', '.join(sources)}"
            )
        if not math.isfinite(weight) or weight < 0:
            raise UserError(f"weights.{name}: {weight} is not a weight; give a number from 0 up")
    given = np.array([float(weights.get(name, 0.0)) for name in sources])
    if not given.sum() > 0:
        raise UserError("weights: they sum to zero; give at least one source a weight above 0")
    return given


def project_to_bounds(
    weights: Float64[np.ndarray, " k"] | Sequence[float], min_weight: float, max_weight: float
) -> Float64[np.ndarray, " k"]:
    """The nearest point of `{w : sum w = 1, min_weight <= w <= max_weight}`, exactly, in float64.

    It is `clip(weights - t)` for the one t at which the sum is 1. The sum falls piecewise linearly
    in t and bends only where some weight meets a bound, so t is found by sorting those places
    (Wang and Carreira-Perpinan, arXiv 1309.1541, for a simplex with two-sided bounds).
    `UserError` if the bounds cannot be met or a weight is not finite.
    """
    given = np.asarray(weights, np.float64)
    count = len(given)
    if not np.isfinite(given).all():
        raise UserError(f"weights: {given.tolist()} are not all finite")
    if not min_weight <= max_weight or count * min_weight > 1 + 1e-12:
        raise UserError(_infeasible(count, min_weight, max_weight))
    if count * max_weight < 1 - 1e-12:
        raise UserError(_infeasible(count, min_weight, max_weight))
    bends = np.unique(np.concatenate([given - min_weight, given - max_weight]))
    sums = np.clip(given[:, None] - bends, min_weight, max_weight).sum(axis=0)
    after = int(np.searchsorted(-sums, -1.0))
    if after in (0, len(bends)):
        shift = bends[min(after, len(bends) - 1)]
        return np.clip(given - shift, min_weight, max_weight)
    middle = (bends[after - 1] + bends[after]) / 2
    free = (given - middle > min_weight) & (given - middle < max_weight)
    if not free.any():  # all at a bound, whose sum is 1 but for its rounding
        return np.clip(given - middle, min_weight, max_weight)
    fixed = np.clip(given - middle, min_weight, max_weight)[~free].sum()
    shift = (given[free].sum() + fixed - 1) / free.sum()
    return np.clip(given - shift, min_weight, max_weight)


def _infeasible(count: int, min_weight: float, max_weight: float) -> str:
    low = math.floor(UNIT // count / UNIT * 1e4) / 1e4
    high = math.ceil(-(-UNIT // count) / UNIT * 1e4) / 1e4
    return (
        f"weights of {count} sources cannot all lie between min_weight {min_weight:g} and "
        f"max_weight {max_weight:g} and sum to 1 in steps of 1/{UNIT}; take min_weight up to "
        f"{low:g} and max_weight from {high:g} up"
    )

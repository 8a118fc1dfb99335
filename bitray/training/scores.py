"""From gradients' inner products to weights of sources: the mathematics of influence, no models.

n gradients, probes first, then `groups` of every source one source after the other; a Gram matrix
[layers, n, n] holds their inner products, layer by layer. See DATA, section 5.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float64

from bitray.data.weights import project_to_bounds

Gram = Float64[np.ndarray, "layers n n"]
Scores = Float64[np.ndarray, "probes sources"]
_TINY = 1e-300


def cosine(gram: Gram, probes: int, damping: float) -> Scores:
    """`<g_k, g_p> / (|g_k| |g_p|)`, the mean over layers, so that no layer drowns the others."""
    return _between(_normalised(gram), probes)


def dot(gram: Gram, probes: int, damping: float) -> Scores:
    """`<g_k, g_p>`: what a small step on the source takes off the probe's loss."""
    return gram.sum(0)[:probes, probes:]


def datainf(gram: Gram, probes: int, damping: float) -> Scores:
    """Influence with the closed-form inverse Hessian of DataInf (Kwon et al., arXiv 2310.00902).

    Per layer `1/l * (G_pk - mean_i G_pi G_ik / (l + G_ii))` over the sources i, with
    `l = damping * mean_i G_ii`; divided by both norms, then the mean over layers.
    """
    norms = np.einsum("lii->li", gram)[:, probes:]
    damp = damping * norms.mean(1, keepdims=True) + _TINY
    between, within = gram[:, :probes, probes:], gram[:, probes:, probes:]
    explained = (between / (damp + norms)[:, None, :]) @ within / norms.shape[1]
    influence = (between - explained) / damp[..., None]
    # Relative to its own scale, 1 / damp, and to the norms of both gradients.
    lengths = np.sqrt(np.einsum("lii->li", gram)) + _TINY
    scale = lengths[:, :probes, None] * lengths[:, None, probes:]
    return (influence * damp[..., None] / scale).mean(0)


METHODS: dict[str, Callable[[Gram, int, float], Scores]] = {
    "cosine": cosine,
    "datainf": datainf,
    "dot": dot,
}


def _normalised(gram: Gram) -> Gram:
    lengths = np.sqrt(np.einsum("lii->li", gram)) + _TINY
    return gram / (lengths[:, :, None] * lengths[:, None, :])


def _between(gram: Gram, probes: int) -> Scores:
    return gram[:, :probes, probes:].mean(0)


class Measured(NamedTuple):
    """What one method says about every source for every probe."""

    score: Scores
    """Positive: training on the source lowers the probe's loss."""
    error: Scores
    """Standard error over the groups of the source."""


def measured(method: str, gram: Gram, probes: int, groups: int, damping: float = 0.1) -> Measured:
    """Scores of the sources' mean gradients; their errors by leaving out one group of each at a
    time (the jackknife: Efron and Stein, 1981)."""
    rule, everyone = METHODS[method], range(groups)

    def score(kept: Sequence[int]) -> Scores:
        return rule(_averaged(gram, probes, groups, kept), probes, damping)

    without = np.stack([score([each for each in everyone if each != out]) for out in everyone])
    spread = np.square(without - without.mean(0)).sum(0)
    return Measured(score(everyone), np.sqrt(spread * (groups - 1) / groups))


def _averaged(
    gram: Gram, probes: int, groups: int, kept: Sequence[int]
) -> Float64[np.ndarray, "layers m m"]:
    """Inner products of the probes' and the sources' mean gradients, over the groups `kept`.

    A mean over few rows is longer than the gradient that it estimates, by its noise, the more the
    more varied a source is, so that what repeats itself would seem to point better. Therefore the
    square of its own length is taken between different groups, whose noise is independent: that is
    unbiased. Where next to nothing is left of it, it is all noise, and one part in `kept` counts.
    """
    sources, count = (gram.shape[-1] - probes) // groups, len(kept)
    mean = np.zeros((probes + sources, gram.shape[-1]))
    mean[:probes, :probes] = np.eye(probes)
    for group in kept:
        mean[probes:, probes + group :: groups] += np.eye(sources) / count
    average = mean @ gram @ mean.T
    if count > 1:
        alone = np.einsum("sn,lnn->ls", mean[probes:] ** 2, gram)  # groups with themselves
        own = np.einsum("lss->ls", average[:, probes:, probes:])
        between = (own - alone) * count / (count - 1)
        at = np.arange(probes, probes + sources)
        average[:, at, at] = np.maximum(between, own / count)
    return average


def standing(found: Measured, probe_weights: Sequence[float]) -> Float64[np.ndarray, " sources"]:
    """Where each source stands among the others: z-scores, averaged over the probes.

    Per probe the spread over sources has the standard error as its floor, and what could be noise
    is taken off: scores shrink by `1 - error^2 / spread^2` (James and Stein, 1961), so that sources
    which do not differ by more than their errors stand equal, instead of at random.
    """
    centred = found.score - found.score.mean(1, keepdims=True)
    spread = np.sqrt(np.square(centred).mean(1, keepdims=True))
    error = np.sqrt(np.square(found.error).mean(1, keepdims=True))
    kept = np.maximum(0.0, 1 - np.square(error / np.maximum(spread, _TINY)))
    z = centred / np.maximum(np.maximum(spread, error), _TINY) * kept
    share = np.asarray(probe_weights, np.float64) / np.sum(probe_weights)
    return share @ z


def surely_harmful(
    found: Measured, probe_weights: Sequence[float]
) -> Float64[np.ndarray, " sources"]:
    """1 where even the upper bound of a source's benefit (two standard errors up) is not positive.

    Scores are compared in units of each probe's own, so that no probe drowns the others.
    """
    share = np.asarray(probe_weights, np.float64) / np.sum(probe_weights)
    scale = np.abs(found.score).mean(1, keepdims=True) + _TINY
    mean = share @ (found.score / scale)
    error = np.sqrt(np.square(share) @ np.square(found.error / scale))
    return (mean + 2 * error <= 0).astype(np.float64)


def preferred(
    score: Float64[np.ndarray, " sources"],
    harmful: Float64[np.ndarray, " sources"],
    temperature: float,
) -> Float64[np.ndarray, " sources"]:
    """`softmax(score / temperature)` over the sources that are not surely harmful."""
    logits = np.where(harmful > 0, -np.inf, score / temperature)
    if not np.isfinite(logits).any():
        logits = score / temperature  # all of them: then the least harmful
    shares = np.exp(logits - logits.max())
    return shares / shares.sum()


def moved(
    weights: Float64[np.ndarray, " sources"],
    optimal: Float64[np.ndarray, " sources"],
    rate: float,
    bounds: tuple[float, float],
) -> Float64[np.ndarray, " sources"]:
    """`Proj((1 - rate) w + rate * Proj(optimal))`, exact projections onto the bounds."""
    target = project_to_bounds(optimal, *bounds)
    return project_to_bounds((1 - rate) * weights + rate * target, *bounds)


# -------------------------------------------------------------------------------------------- ADO


def learning_speed(
    points: Sequence[tuple[float, float]],
) -> float | None:
    """How fast a source's loss still falls, `-n dL/dn = a (L - e)` at the last point, from the law
    `L = e + b n^-a` fitted to points `(tokens n, loss L)`; None if there is no law to be seen.

    The law is linear in logarithms once `e` is known, which is tried on a grid.
    """
    if len(points) < 3 or not np.isfinite(points).all():
        return None
    n, loss = np.array(points, np.float64).T
    best: tuple[float, float] | None = None
    x = np.log(n) - np.log(n).mean()
    for floor in np.linspace(0, 0.98, 50) * loss.min():
        y = np.log(loss - floor)
        slope = float(x @ (y - y.mean()) / (x @ x))
        fitted = floor + np.exp(y.mean() + slope * x)
        miss = float(np.square(fitted - loss).sum())
        if best is None or miss < best[0]:
            best = miss, max(0.0, -slope) * float(fitted[-1] - floor)
    assert best is not None
    return best[1]


def ado(
    history: Mapping[str, Sequence[tuple[float, float]]],
    prior: Float64[np.ndarray, " sources"],
    weights: Float64[np.ndarray, " sources"],
) -> Float64[np.ndarray, " sources"] | None:
    """Adaptive Data Optimization (Jiang et al., arXiv 2410.11820): share of a source in proportion
    to `prior * sqrt(its recent share) * learning speed`; None while some law is not to be seen."""
    speeds = [learning_speed(points) for points in history.values()]
    if any(speed is None for speed in speeds):
        return None
    raw = prior * np.sqrt(weights) * np.array(speeds, np.float64)
    return raw / raw.sum() if raw.sum() > 0 else None

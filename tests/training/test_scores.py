"""From inner products to weights, against gradients written out and known answers."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitray.training.scores import (
    METHODS,
    Measured,
    ado,
    learning_speed,
    measured,
    moved,
    preferred,
    standing,
    surely_harmful,
)

LAYERS, WIDTH, GROUPS = 3, 20, 4


def gradients(seed: int, probes: int, sources: int) -> np.ndarray:
    """[layers, probes + groups * sources, width]"""
    return np.random.default_rng(seed).normal(size=(LAYERS, probes + GROUPS * sources, WIDTH))


def gram_of(vectors: np.ndarray) -> np.ndarray:
    return vectors @ vectors.transpose(0, 2, 1)


def mean_gradients(vectors: np.ndarray, probes: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the probes, and of the sources averaged over their groups, written out."""
    groups = vectors[:, probes:].reshape(LAYERS, -1, GROUPS, WIDTH)
    return vectors[:, :probes], groups.mean(2)


def lengths(vectors: np.ndarray, probes: int) -> np.ndarray:
    """[layers, sources]: of the mean gradients, by the products of two different groups."""
    groups = vectors[:, probes:].reshape(LAYERS, -1, GROUPS, WIDTH)
    pairs = itertools.permutations(range(GROUPS), 2)
    between = [(groups[:, :, i] * groups[:, :, j]).sum(-1) for i, j in pairs]
    own = np.square(groups.mean(2)).sum(-1)
    return np.sqrt(np.maximum(np.mean(between, 0), own / GROUPS))


def test_scores_are_those_of_the_mean_gradients() -> None:
    vectors = gradients(0, 2, 5)
    of_probes, of_sources = mean_gradients(vectors, 2)
    norms = lengths(vectors, 2)
    for p in range(2):
        for k in range(5):
            pairs = [(of_probes[layer, p], of_sources[layer, k]) for layer in range(LAYERS)]
            cosines = [
                a @ b / np.linalg.norm(a) / n for (a, b), n in zip(pairs, norms[:, k], strict=True)
            ]
            got = {m: measured(m, gram_of(vectors), 2, GROUPS).score[p, k] for m in METHODS}
            assert got["cosine"] == pytest.approx(np.mean(cosines))
            assert got["dot"] == pytest.approx(sum(a @ b for a, b in pairs))
            infos = []
            for layer, (a, b) in enumerate(pairs):
                train, own = of_sources[layer], norms[layer]
                damp = 0.1 * np.mean(own**2)
                # DataInf, equation 5: the mean over i of (damp + g_i g_i^T)^-1, by Sherman and
                # Morrison; where g_i meets itself, by its length as it is known
                taken = [
                    (a @ g) * (own[k] ** 2 if i == k else g @ b) / (damp + own[i] ** 2)
                    for i, g in enumerate(train)
                ]
                info = a @ b - np.mean(taken)
                infos.append(info / np.linalg.norm(a) / own[k])
            assert got["datainf"] == pytest.approx(np.mean(infos))


def test_datainf_is_the_mean_of_inverses_where_nothing_is_noise() -> None:
    """DataInf, equation 5, with the inverses themselves."""
    once = np.random.default_rng(5).normal(size=(LAYERS, 1 + 4, WIDTH))
    vectors = np.concatenate([once[:, :1], np.repeat(once[:, 1:], GROUPS, axis=1)], axis=1)
    got = measured("datainf", gram_of(vectors), 1, GROUPS).score[0]
    for k in range(4):
        infos = []
        for probe, *train in once:
            damp = 0.1 * np.mean([g @ g for g in train])
            inverses = [np.linalg.inv(damp * np.eye(WIDTH) + np.outer(g, g)) for g in train]
            info = probe @ np.mean(inverses, axis=0) @ train[k] * damp
            infos.append(info / np.linalg.norm(probe) / np.linalg.norm(train[k]))
        assert got[k] == pytest.approx(np.mean(infos))


def test_noise_of_a_varied_source_costs_it_nothing() -> None:
    """Two sources with the same gradient, rows of one of which differ: on average they score the
    same, where plain lengths would take a third off the varied one."""
    draw, scores = np.random.default_rng(6), []
    for _ in range(400):
        signal = draw.normal(size=(LAYERS, 1, WIDTH))
        probe = signal + draw.normal(size=signal.shape)
        varied = signal + 1.5 * draw.normal(size=(LAYERS, GROUPS, WIDTH))
        vectors = np.concatenate([probe, np.repeat(signal, GROUPS, axis=1), varied], axis=1)
        scores.append(measured("cosine", gram_of(vectors), 1, GROUPS).score[0])
    same, noisy = np.mean(scores, 0)
    assert noisy == pytest.approx(same, rel=0.1)


def test_the_error_is_that_of_a_mean() -> None:
    """`dot` is linear in the source's gradient, so its jackknife is the plain standard error."""
    vectors = gradients(1, 1, 3)
    each = np.einsum("lpw,lnw->n", vectors[:, :1], vectors[:, 1:]).reshape(3, GROUPS)
    expected = each.std(1, ddof=1) / np.sqrt(GROUPS)
    assert measured("dot", gram_of(vectors), 1, GROUPS).error[0] == pytest.approx(expected)


@pytest.mark.parametrize("method", METHODS)
def test_scaling_a_loss_changes_nobodys_standing(method: str) -> None:
    """Ten times all gradients, or ten times those of one probe."""
    vectors = gradients(2, 2, 6)
    vectors[:, 2:] += np.repeat(gradients(3, 0, 6)[:, ::GROUPS], GROUPS, axis=1)  # a signal
    plain = standing(measured(method, gram_of(vectors), 2, GROUPS), [1.0, 3.0])
    assert plain.any()
    louder = vectors.copy()
    louder[:, 0] *= 10
    for other in (louder, vectors * 10):
        found = standing(measured(method, gram_of(other), 2, GROUPS), [1.0, 3.0])
        assert found == pytest.approx(plain)


def test_permuted_sources_permute() -> None:
    vectors = gradients(4, 1, 5)
    order = np.array([3, 0, 4, 1, 2])
    groups = vectors[:, 1:].reshape(LAYERS, 5, GROUPS, WIDTH)[:, order].reshape(LAYERS, -1, WIDTH)
    permuted = np.concatenate([vectors[:, :1], groups], axis=1)
    for method in METHODS:
        first = measured(method, gram_of(vectors), 1, GROUPS)
        second = measured(method, gram_of(permuted), 1, GROUPS)
        assert second.score == pytest.approx(first.score[:, order])
        assert second.error == pytest.approx(first.error[:, order])


def test_sources_that_are_alike_stand_alike() -> None:
    """What differs by chance alone is shrunk: most draws leave all of them equal or nearly so."""
    spread = []
    for seed in range(200):
        draw = np.random.default_rng(seed)
        truth = draw.normal(size=(LAYERS, 1, WIDTH))
        vectors = truth + 0.5 * draw.normal(size=(LAYERS, 1 + GROUPS * 6, WIDTH))
        found = measured("cosine", gram_of(vectors), 1, GROUPS)
        spread.append(np.abs(standing(found, [1.0])).max())
    assert np.median(spread) < 0.6  # unshrunk z-scores of six sources reach 1.6 in the median


def test_what_differs_keeps_its_z_score() -> None:
    sure = Measured(np.array([[0.9, 0.1, 0.2, -0.4]]), np.full((1, 4), 1e-4))
    score = sure.score[0]
    assert standing(sure, [1.0]) == pytest.approx((score - score.mean()) / score.std(), rel=1e-6)
    unsure = sure._replace(error=np.full((1, 4), 10.0))
    assert not standing(unsure, [1.0]).any()


def test_harmful_sources_are_preferred_by_nobody() -> None:
    found = Measured(np.array([[0.5, 0.0, -0.3, 0.01]]), np.full((1, 4), 0.02))
    harmful = surely_harmful(found, [1.0])
    assert harmful.tolist() == [0, 0, 1, 0]  # about 0 is not surely harmful, z-scores see to it
    shares = preferred(standing(found, [1.0]), harmful, 0.5)
    assert shares[2] == 0 and shares.sum() == pytest.approx(1) and shares.argmax() == 0
    assert preferred(np.zeros(3), np.ones(3), 0.5) == pytest.approx(np.full(3, 1 / 3))


@given(st.integers(0, 10**6), st.integers(2, 12))
def test_moving_keeps_the_bounds(seed: int, count: int) -> None:
    draw = np.random.default_rng(seed)
    low, high = draw.uniform(0, 1 / count), draw.uniform(1 / count, 1)
    weights, optimal = draw.dirichlet(np.ones(count)), draw.dirichlet(np.full(count, 0.2))
    new = moved(weights, optimal, 0.2, (low, high))
    assert new.sum() == pytest.approx(1)
    assert (new >= low - 1e-12).all() and (new <= high + 1e-12).all()


def test_moving_goes_a_fifth_of_the_way_to_the_projection() -> None:
    new = moved(np.full(4, 0.25), np.array([0.97, 0.01, 0.01, 0.01]), 0.2, (0.05, 0.60))
    target = np.array([0.60, 0.4 / 3, 0.4 / 3, 0.4 / 3])
    assert new == pytest.approx(0.8 * 0.25 + 0.2 * target)


def test_learning_speed_of_a_power_law() -> None:
    """L = 2 + 5 n^-0.3: -n dL/dn = 0.3 * 5 n^-0.3."""
    tokens = np.geomspace(1e3, 1e5, 12)
    points = [(n, 2 + 5 * n**-0.3) for n in tokens]
    assert learning_speed(points) == pytest.approx(1.5 * 1e5**-0.3, rel=0.05)
    assert learning_speed([(n, 3.0) for n in tokens]) == pytest.approx(0, abs=1e-6)
    assert learning_speed(points[:2]) is None


def test_ado_prefers_what_is_still_learnt() -> None:
    tokens = np.geomspace(1e3, 1e5, 10)
    history = {
        "fast": [(n, 1 + 20 * n**-0.4) for n in tokens],
        "slow": [(n, 1 + 2 * n**-0.4) for n in tokens],
        "flat": [(n, 4.0) for n in tokens],
    }
    even = np.full(3, 1 / 3)
    shares = ado(history, even, even)
    assert shares is not None
    assert shares[0] / shares[1] == pytest.approx(10, rel=0.05) and shares[2] < 1e-3
    assert ado({**history, "new": []}, np.full(4, 0.25), np.full(4, 0.25)) is None

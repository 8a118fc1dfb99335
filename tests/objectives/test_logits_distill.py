"""KL divergence against numpy in fp64, with and without the bucket for what is not in the top k."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from bitray.objectives import LogitsDistill


def _softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def _case(tokens: int = 6, vocab: int = 20) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    return rng.normal(size=(tokens, vocab)) * 3, rng.normal(size=(tokens, vocab)) * 3


def _loss(objective: LogitsDistill, student: np.ndarray, teacher: np.ndarray) -> torch.Tensor:
    z = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    labels = torch.zeros(len(z), dtype=torch.int64)
    loss, _ = objective.on_logits(z, labels, torch.tensor(teacher, dtype=torch.float32))
    loss.backward()
    return torch.cat([loss.detach()[None], z.grad.flatten()])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0, 5.0])
def test_value_and_gradient(temperature):
    student, teacher = _case()
    p, q = _softmax(teacher / temperature), _softmax(student / temperature)
    expected = temperature**2 * (p * np.log(p / q)).sum()
    gradient = temperature * (q - p)  # T^2 * (q - p) / T
    got = _loss(LogitsDistill(temperature=temperature), student, teacher)
    assert got[0].item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(got[1:].reshape(student.shape), gradient, rtol=1e-4, atol=1e-5)


def test_the_default_temperature_is_2():
    student, teacher = _case()
    assert torch.equal(
        _loss(LogitsDistill(), student, teacher),
        _loss(LogitsDistill(temperature=2.0), student, teacher),
    )


@pytest.mark.parametrize("k", [1, 3, 18])
def test_top_k_is_the_kl_of_the_teachers_likeliest_and_one_bucket(k):
    student, teacher = _case()
    p, q = _softmax(teacher / 2), _softmax(student / 2)
    expected = 0.0
    for row_p, row_q in zip(p, q, strict=True):
        top = np.argsort(-row_p)[:k]
        bucketed = [np.append(row[top], 1 - row[top].sum()) for row in (row_p, row_q)]
        expected += 4 * (bucketed[0] * np.log(bucketed[0] / bucketed[1])).sum()
    got = _loss(LogitsDistill(top_k=k), student, teacher)
    assert got[0].item() == pytest.approx(expected, rel=1e-4)


@settings(deadline=None)
@given(st.integers(1, 25))
def test_top_k_never_exceeds_the_full_divergence_and_meets_it_at_the_end(k):
    """Merging outcomes cannot raise a KL (data processing); merging only one merges nothing."""
    student, teacher = _case()
    full = _loss(LogitsDistill(), student, teacher)
    some = _loss(LogitsDistill(top_k=k), student, teacher)
    assert some.isfinite().all()
    assert some[0] <= full[0] * (1 + 1e-5)
    if k >= 19:
        torch.testing.assert_close(some, full, rtol=1e-4, atol=1e-5)


def test_a_certain_teacher_leaves_the_bucket_empty_but_finite():
    student, teacher = _case()
    teacher[:, 4] = 500.0
    got = _loss(LogitsDistill(top_k=2), student, teacher)
    assert got.isfinite().all()
    q = _softmax(student / 2)
    assert got[0].item() == pytest.approx(-4 * np.log(q[:, 4]).sum(), rel=1e-4)


def test_small_divergences_are_not_lost_in_rounding():
    """Late in training student and teacher nearly agree; entropy minus cross-entropy is noise."""
    _, teacher = _case(vocab=2000)
    student = teacher + 1e-3 * np.random.default_rng(2).normal(size=teacher.shape)
    p, q = _softmax(teacher / 2), _softmax(student / 2)
    expected = 4 * (p * np.log(p / q)).sum()
    got = _loss(LogitsDistill(), student, teacher)
    assert got[0].item() == pytest.approx(expected, rel=0.2)

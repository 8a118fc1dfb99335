"""Cross-entropy and its smoothing against numpy, and its gradient against the closed form."""

import numpy as np
import pytest
import torch

from bitray.models.batch import IGNORED
from bitray.objectives import ContinuePretrain


def _case() -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 7, 9)
    labels[[2, 5]] = IGNORED
    return rng.normal(size=(9, 7)) * 3, labels


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.7])
def test_value_and_gradient(smoothing):
    logits, labels = _case()
    real = labels != IGNORED
    probabilities = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    target = (1 - smoothing) * np.eye(7)[np.where(real, labels, 0)] + smoothing / 7
    expected = -(target * np.log(probabilities)).sum(-1)[real].sum()

    z = torch.tensor(logits, dtype=torch.float32, requires_grad=True)
    loss, _ = ContinuePretrain(label_smoothing=smoothing).on_logits(z, torch.tensor(labels), None)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    np.testing.assert_allclose(
        z.grad.numpy(), (probabilities - target) * real[:, None], rtol=1e-4, atol=1e-6
    )


def test_what_is_reported_makes_perplexity_whatever_the_smoothing():
    logits, labels = _case()
    z, y = torch.tensor(logits, dtype=torch.float32), torch.tensor(labels)
    plain, reported = ContinuePretrain().on_logits(z, y, None)
    smooth, also = ContinuePretrain(label_smoothing=0.3).on_logits(z, y, None)
    assert reported["nll"] == also["nll"] == plain
    assert smooth != plain


def test_uniform_logits_cost_log_of_the_vocabulary():
    loss, _ = ContinuePretrain().on_logits(torch.zeros(4, 50), torch.arange(4), None)
    assert loss.item() == pytest.approx(4 * np.log(50))

"""All five distances against numpy in fp64, by value and by directional derivative."""

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from bitray.objectives import HiddenDistill
from bitray.settings import UserError

KINDS = ["cosine", "mse_normalized", "mse", "inner_product", "kl"]
TOKENS, WIDTH, VOCAB = 5, 12, 17


def _logp(z: np.ndarray) -> np.ndarray:
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def _reference(kind: str, s: np.ndarray, t: np.ndarray, head: np.ndarray) -> float:
    norm_s, norm_t = (np.sqrt((x * x).sum(-1, keepdims=True)) for x in (s, t))
    cos = (s * t).sum(-1) / (norm_s * norm_t)[:, 0]
    match kind:
        case "cosine":
            return (1 - cos).sum()
        case "mse_normalized":
            return ((s / norm_s - t / norm_t) ** 2).sum()
        case "mse":
            return ((s - t) ** 2).mean(-1).sum()
        case "inner_product":
            return (((s * t).sum(-1) / (t * t).sum(-1) - 1) ** 2).sum()
    log_t, log_s = _logp(t @ head.T), _logp(s @ head.T)
    return (np.exp(log_t) * (log_t - log_s)).sum()


def _case(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return tuple(rng.normal(size=shape) for shape in ((TOKENS, WIDTH),) * 2 + ((VOCAB, WIDTH),))


def _on_layer(objective: HiddenDistill, index: int, layers: int, *arrays: np.ndarray):
    student, *rest = (torch.tensor(a, dtype=torch.float32) for a in arrays)
    student.requires_grad_()
    loss, reported = objective.on_layer(index, layers, student, *rest)
    loss.backward()
    return loss.item(), student.grad.double().numpy(), reported


@pytest.mark.parametrize("kind", KINDS)
def test_value_and_gradient(kind):
    student, teacher, head = _case()
    loss, gradient, _ = _on_layer(HiddenDistill(loss_type=kind), 0, 1, student, teacher, head)
    assert loss == pytest.approx(_reference(kind, student, teacher, head), rel=1e-5)
    for direction in np.random.default_rng(9).normal(size=(4, TOKENS, WIDTH)):
        step = 1e-5 * direction
        rise = [_reference(kind, student + sign * step, teacher, head) for sign in (1, -1)]
        slope = (rise[0] - rise[1]) / 2e-5
        assert (gradient * direction).sum() == pytest.approx(slope, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_zero_for_identical_states(kind):
    _, teacher, head = _case()
    loss, gradient, reported = _on_layer(
        HiddenDistill(loss_type=kind), 0, 1, teacher, teacher, head
    )
    assert abs(loss) < 1e-6
    assert abs(gradient).max() < 1e-5
    assert reported["cosine"].item() == pytest.approx(TOKENS)


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_states_are_compared_in_fp32(kind):
    student, teacher, head = (torch.tensor(a).bfloat16() for a in _case())
    loss, _ = HiddenDistill(loss_type=kind).on_layer(0, 1, student, teacher, head)
    expected = _reference(kind, *(a.double().numpy() for a in (student, teacher, head)))
    assert loss.dtype == torch.float32
    tolerance = 0.05 if kind == "kl" else 1e-5  # logits are a product in the head's own precision
    assert loss.item() == pytest.approx(expected, rel=tolerance)


def test_mse_normalized_is_a_sum_over_the_hidden_axis_and_so_twice_the_cosine_distance():
    """As a mean it would read 0.0019 at a cosine of 0.46 and 576 channels."""
    student, teacher, head = _case()
    normalized, _, reported = _on_layer(HiddenDistill(), 0, 1, student, teacher, head)
    cosine, _, _ = _on_layer(HiddenDistill(loss_type="cosine"), 0, 1, student, teacher, head)
    assert normalized == pytest.approx(2 * cosine)
    assert cosine == pytest.approx(TOKENS - reported["cosine"].item())


# ---- layer weights


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("uniform", [1 / 4] * 4),
        ("progressive", [0.1, 0.2, 0.3, 0.4]),
        ("exponential", [1 / 15, 2 / 15, 4 / 15, 8 / 15]),
        ([0, 1, 0, 3], [0, 0.25, 0, 0.75]),
    ],
)
def test_layer_weights_sum_to_1(given, expected):
    objective = HiddenDistill(layer_weights=given)
    assert objective.shares(4) == pytest.approx(expected)
    student, teacher, head = _case()
    parts = [_on_layer(objective, i, 4, student, teacher, head)[0] for i in range(4)]
    assert parts == pytest.approx([e * sum(parts) for e in expected])


def test_exponential_weights_of_a_deep_model_stay_finite():
    shares = HiddenDistill(layer_weights="exponential").shares(2000)
    assert sum(shares) == pytest.approx(1)
    assert shares[-1] == pytest.approx(0.5)


def test_the_mean_cosine_over_layers_does_not_follow_the_layer_weights():
    objective = HiddenDistill(layer_weights=[0, 0, 1])
    cases = [_case(seed) for seed in range(3)]
    reported = [_on_layer(objective, i, 3, *c)[2]["cosine"].item() for i, c in enumerate(cases)]
    expected = [TOKENS - _reference("cosine", *c) for c in cases]
    assert sum(reported) == pytest.approx(np.mean(expected), abs=1e-5)


def test_a_list_of_the_wrong_length_is_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"layer_weights has 3 numbers .* 4 decoder layers"):
        HiddenDistill(layer_weights=[1, 2, 3]).shares(4)


@pytest.mark.parametrize("given", [[-1.0, 2.0], [0.0, 0.0], [], [float("nan")], "linear"])
def test_impossible_layer_weights_are_refused(given):
    with pytest.raises(ValidationError):
        HiddenDistill(layer_weights=given)

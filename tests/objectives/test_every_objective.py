"""What must hold of every objective. A new one is picked up from the fields of `Objectives`."""

from typing import Any, get_args

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from bitray.models.batch import IGNORED, Batch
from bitray.objectives import Objective, Objectives

VOCAB, WIDTH, LAYERS, TOKENS = 11, 8, 3, 13


def _class_of(annotation: object) -> type[Objective]:
    return next(kind for kind in get_args(annotation) if kind is not type(None))


EVERY = {name: _class_of(f.annotation) for name, f in Objectives.model_fields.items()}
EVERY = {name: kind for name, kind in EVERY.items() if kind.kind != "router"}
"""What compares token by token; balance is of all tokens together (`test_moe_loss`)."""
WITH_TEACHER = [name for name, kind in EVERY.items() if kind.needs_teacher]


def _random(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _inputs(kind: str, seed: int, tokens: int = TOKENS) -> Tensor:
    """What an objective of this kind compares: logits, the states of all layers, or queries, keys
    and values (of a batch of one document)."""
    if kind == "head":
        return 3 * _random(tokens, VOCAB, seed=seed)
    return _random(LAYERS, tokens, WIDTH, seed=seed)


def _labels(tokens: int = TOKENS) -> Tensor:
    return torch.randint(VOCAB, (tokens,), generator=torch.Generator().manual_seed(7))


def _evaluate(
    objective: Objective, student: Tensor, teacher: Tensor, labels: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole sum, as the wrapper adds it up."""
    if objective.kind == "head":
        return objective.on_logits(student, labels, teacher)  # type: ignore[attr-defined]
    if objective.kind == "attention":
        return _Projections.apply(objective, student, teacher), {}
    head = _random(VOCAB, WIDTH, seed=5)
    total, reported = torch.zeros(()), {}
    for index in range(LAYERS):
        part, sums = objective.on_layer(  # type: ignore[attr-defined]
            index, LAYERS, student[index], teacher[index], head
        )
        total = total + part
        for name, value in sums.items():
            reported[name] = reported.get(name, 0) + value
    return total, reported


class _Projections(torch.autograd.Function):
    """An objective that brings its own gradients, on queries, keys and values."""

    @staticmethod
    def forward(ctx: Any, objective: Any, student: Tensor, teacher: Tensor) -> Tensor:
        tokens = student.shape[1]
        document = torch.ones(1, tokens, dtype=torch.int64)
        states = [[x[None] for x in each.detach()] for each in (student, teacher)]
        total, slopes = objective.on_projections(document, *states, 2, (True,) * 3)
        ctx.slopes = torch.cat(slopes)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        return None, grad * ctx.slopes, None


def _rows(objective: Objective, inputs: Tensor, rows: slice) -> Tensor:
    return inputs[rows] if objective.kind == "head" else inputs[:, rows]


@pytest.fixture(params=sorted(EVERY))
def objective(request: pytest.FixtureRequest) -> Objective:
    return EVERY[request.param]()


def test_is_finite_and_differentiable(objective):
    student = _inputs(objective.kind, seed=0).requires_grad_()
    loss, reported = _evaluate(objective, student, _inputs(objective.kind, seed=1), _labels())
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
    assert all(value.isfinite() and not value.requires_grad for value in reported.values())


def test_is_finite_for_extreme_inputs(objective):
    for size in (0.0, 1e-20, 1e4):
        student = (size * _inputs(objective.kind, seed=0)).requires_grad_()
        teacher = size * _inputs(objective.kind, seed=1)
        loss, _ = _evaluate(objective, student, teacher, _labels())
        loss.backward()
        assert loss.isfinite(), size
        assert student.grad.isfinite().all(), size


def test_masked_tokens_add_nothing_and_get_no_gradient(objective):
    if objective.kind != "head":
        pytest.skip("labels are nothing to it; it compares real tokens")
    labels = _labels()
    labels[::2] = IGNORED
    student, teacher = _inputs("head", seed=0).requires_grad_(), _inputs("head", seed=1)
    loss, reported = _evaluate(objective, student, teacher, labels)
    kept = _evaluate(objective, student[1::2], teacher[1::2], labels[1::2])
    torch.testing.assert_close(loss, kept[0])
    torch.testing.assert_close(reported, kept[1])
    loss.backward()
    assert student.grad[::2].eq(0).all()


def test_is_zero_when_everything_is_masked(objective):
    for tokens, labels in ((0, _labels(0)), (TOKENS, torch.full((TOKENS,), IGNORED))):
        if objective.kind != "head" and tokens:
            continue
        student = _inputs(objective.kind, seed=0, tokens=tokens).requires_grad_()
        teacher = _inputs(objective.kind, seed=1, tokens=tokens)
        loss, reported = _evaluate(objective, student, teacher, labels)
        loss.backward()
        assert loss == 0
        assert student.grad.eq(0).all()
        assert all(value == 0 for value in reported.values())


def test_is_a_sum_over_tokens_each_compared_in_its_own_place(objective):
    """Chunks may be cut anywhere, so the shift is the caller's alone: row i goes with label i."""
    if objective.kind == "attention":
        pytest.skip("tokens are compared with those before them")
    student, teacher = _inputs(objective.kind, seed=0), _inputs(objective.kind, seed=1)
    labels = _labels()
    whole, reported = _evaluate(objective, student, teacher, labels)
    parts = []
    for rows in (slice(0, 5), slice(5, 6), slice(6, TOKENS)):
        cut = [_rows(objective, x, rows) for x in (student, teacher)]
        parts.append(_evaluate(objective, *cut, labels[rows]))
    torch.testing.assert_close(whole, sum(loss for loss, _ in parts))
    for name, value in reported.items():
        torch.testing.assert_close(value, sum(sums[name] for _, sums in parts))


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_a_student_like_its_teacher_has_nothing_to_learn(name):
    objective = EVERY[name]()
    teacher = _inputs(objective.kind, seed=1)
    student = teacher.clone().requires_grad_()
    loss, _ = _evaluate(objective, student, teacher, _labels())
    loss.backward()
    assert loss.abs() < 1e-6
    assert student.grad.abs().max() < 1e-5


@pytest.mark.parametrize("name", WITH_TEACHER)
def test_no_gradient_reaches_the_teacher(name):
    objective = EVERY[name]()
    student = _inputs(objective.kind, seed=0).requires_grad_()
    teacher = _inputs(objective.kind, seed=1).requires_grad_()
    _evaluate(objective, student, teacher, _labels())[0].backward()
    assert teacher.grad is None


def _batch() -> Batch:
    """Two rows of 6; documents of 3 and 2, then padding; one document of 6."""
    ids = torch.arange(12).reshape(2, 6)
    real = torch.tensor([[1, 1, 1, 1, 1, 0], [1] * 6]).bool()
    labels = torch.where(real, ids, IGNORED)
    labels[0, 0] = labels[0, 3] = labels[1, 0] = IGNORED
    positions = torch.tensor([[0, 1, 2, 0, 1, 0], [0, 1, 2, 3, 4, 5]])
    return Batch(ids, labels, positions, torch.zeros(2, dtype=torch.int64), real)


def test_view_and_count(objective):
    batch = _batch()
    maker = EVERY[objective.view_of]() if objective.view_of else objective
    view = maker.view(batch, torch.Generator())
    count = objective.count(view)
    assert count.shape == ()
    assert not count.is_floating_point()
    if view is batch:
        # 2 + 1 of row 0, 5 of row 1 have a position that predicts them; 5 + 6 tokens are real
        assert count == (8 if objective.kind == "head" else 11)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf")])
def test_weights_are_finite_and_not_negative(objective, weight):
    with pytest.raises(ValidationError):
        type(objective)(weight=weight)


def test_settings_round_trip(objective):
    again = type(objective).model_validate(objective.model_dump(mode="json"))
    assert again == objective

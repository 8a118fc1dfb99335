"""A teacher's likeliest tokens, against the dense path and against numpy."""

import numpy as np
import pytest
import torch
from tiny_models import make_model
from torch import Tensor
from torch.nn import functional as F

from bitray.models.batch import Batch
from bitray.models.losses import NEVER, LossModel, Term, run_teacher
from bitray.models.sparse import TopK
from bitray.objectives import LogitsDistill


def case(tokens: int = 7, vocab: int = 23) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(3)
    return tuple(3 * torch.randn(tokens, vocab, generator=draw) for _ in range(2))


def told(teacher: Tensor, k: int, temperature: float) -> TopK:
    """From the definition, one row after the other in fp64."""
    ids, logp = [], []
    for row in teacher.double().numpy() / temperature:
        p = np.exp(row - row.max()) / np.exp(row - row.max()).sum()
        order = np.argsort(-p)
        ids.append(order[:k])
        rest = [] if k == len(row) else [np.log(p[order[k:]].sum())]
        logp.append([*np.log(p[order[:k]]), *rest])
    return TopK(torch.tensor(np.array(ids)).int(), torch.tensor(logp).float(), temperature)


def loss(objective: LogitsDistill, student: Tensor, teacher: Tensor | TopK) -> Tensor:
    z = student.clone().requires_grad_()
    labels = torch.tensor([5] * (len(z) - 1) + [-100])
    value, _ = objective.on_logits(z, labels, teacher)
    value.backward()
    return torch.cat([value.detach()[None], z.grad.flatten()])


@pytest.mark.parametrize("temperature", [1.0, 2.0, 5.0])
def test_the_whole_vocabulary_is_the_dense_loss(temperature: float) -> None:
    student, teacher = case()
    objective = LogitsDistill(temperature=temperature)
    got = loss(objective, student, told(teacher, 23, temperature))
    torch.testing.assert_close(got, loss(objective, student, teacher), rtol=1e-5, atol=1e-5)


def test_a_student_that_knows_one_token_more_than_the_whole_vocabulary_of_its_teacher() -> None:
    """The mask token, which the teacher gives no chance."""
    student, teacher = case()
    wider = F.pad(teacher[:, :-1], (0, 1), value=NEVER)
    got = loss(LogitsDistill(), student, told(teacher[:, :-1], 22, 2.0))
    torch.testing.assert_close(got, loss(LogitsDistill(), student, wider), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("sent", "compared"), [(1, None), (5, None), (22, None), (9, 4)])
def test_some_tokens_and_the_rest_are_the_dense_loss_on_as_many(
    sent: int, compared: int | None
) -> None:
    student, teacher = case()
    got = loss(LogitsDistill(top_k=compared), student, told(teacher, sent, 2.0))
    expected = loss(LogitsDistill(top_k=compared or sent), student, teacher)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("k", [4, 23])
def test_a_student_that_agrees_loses_nothing(k: int) -> None:
    student, _ = case()
    got = loss(LogitsDistill(), student, told(student, k, 2.0))
    assert got.abs().max() < 1e-5


@pytest.mark.parametrize(("dtype", "error"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_what_travels_in_16_bits_is_a_distribution_again(dtype: torch.dtype, error: float) -> None:
    student, teacher = case()
    exact = told(teacher, 6, 2.0)
    rounded = TopK(exact.ids, exact.logp.to(dtype), 2.0)
    logp, _ = rounded.target(None)
    torch.testing.assert_close(logp.exp().sum(-1), torch.ones(7))
    got, expected = (loss(LogitsDistill(), student, each) for each in (rounded, exact))
    assert got[0].item() == pytest.approx(expected[0].item(), rel=error)


def test_an_answer_at_another_temperature_is_not_taken() -> None:
    student, teacher = case()
    with pytest.raises(AssertionError, match="another T"):
        loss(LogitsDistill(temperature=1.0), student, told(teacher, 4, 2.0))


@pytest.mark.parametrize("chunk", [3, 1000])
def test_in_a_model_it_is_the_teacher_itself_told_briefly(batch: Batch, chunk: int) -> None:
    """A planted shift would be seen: every position has another teacher distribution."""
    student, teacher = make_model(), make_model(seed=1).eval().requires_grad_(False)
    dense = run_teacher(teacher, batch, layers=False)
    logits = dense.hidden @ dense.head.T
    rows = told(logits.flatten(0, 1), 6, 2.0)
    sparse = TopK(rows.ids.view(4, 32, 6), rows.logp.view(4, 32, 7), 2.0)
    found = []
    for answer in (dense, sparse):
        student.zero_grad()
        value, metrics = LossModel(student, chunk)(
            batch, [Term("kl", LogitsDistill(top_k=6), 0.1)], [], answer
        )
        value.backward()
        gradients = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
        found.append(torch.cat([metrics["kl/sum"][None], *gradients]))
    torch.testing.assert_close(*found, rtol=1e-4, atol=1e-6)

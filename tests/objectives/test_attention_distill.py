"""Attention relations against their definition, written out pair by pair."""

import math

import pytest
import torch
from torch import Tensor

from bitray.models.batch import Batch
from bitray.objectives import AttentionDistill, attention_distill
from bitray.settings import UserError

ROWS = [[5, 3], [8], [2, 1, 4], []]
WIDTHS, HEADS = (24, 12, 12), 2
"""Of four heads that share two key-value heads."""
QKV = (True, True, True)


def documents(width: int = 9) -> Tensor:
    ids = torch.zeros(len(ROWS), width, dtype=torch.int64).numpy()
    return Batch.from_rows(ids, ROWS, [0] * len(ROWS)).documents


DOCUMENTS = documents()


def test_documents_are_numbered() -> None:
    assert DOCUMENTS[0].tolist() == [1, 1, 1, 1, 1, 2, 2, 2, 0]
    assert DOCUMENTS[2].tolist() == [1, 1, 2, 3, 3, 3, 3, 0, 0] and not DOCUMENTS[3].any()


def states(seed: int, widths: tuple[int, ...] = WIDTHS, dtype: torch.dtype = torch.float32) -> list:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(len(ROWS), 9, width, generator=draw).to(dtype) for width in widths]


def relations(a: Tensor, heads: int, row: list[int]) -> dict[tuple[int, int, int], Tensor]:
    """(head, document, token) -> distribution over the document's tokens up to this one."""
    found, dim, start = {}, a.shape[-1] // heads, 0
    for number, count in enumerate(row):
        for head in range(heads):
            own = a[start : start + count, head * dim : (head + 1) * dim]
            for i in range(count):
                products = torch.stack([own[i] @ own[j] for j in range(i + 1)])
                found[head, number, i] = (products / math.sqrt(dim)).softmax(0)
        start += count
    return found


def divergence(student: dict, teacher: dict) -> Tensor:
    assert student.keys() == teacher.keys()
    return sum((t * (t.log() - student[k].log())).sum() for k, t in teacher.items())  # type: ignore[return-value]


def naive(student: list, teacher: list, heads: int) -> Tensor:
    """Sum over tokens of the mean over heads and over queries, keys, values."""
    total = torch.zeros((), dtype=torch.float64)
    for s, t in zip(student, teacher, strict=True):
        for index, row in enumerate(ROWS):
            if row:
                pair = [relations(x[index].double(), heads, row) for x in (s, t)]
                total = total + divergence(*pair) / (heads * len(student))
    return total


@pytest.mark.parametrize("teacher_widths", [WIDTHS, (32, 16, 16), (30, 10, 10)])
@pytest.mark.parametrize("tile", [1, 400, 2**22])
def test_value_and_gradient_are_those_of_the_definition(
    teacher_widths: tuple[int, ...], tile: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the tile, and for a teacher with other widths than the student."""
    monkeypatch.setattr(attention_distill, "TILE", tile)
    student, teacher = states(0), states(1, teacher_widths)
    total, slopes = AttentionDistill().on_projections(DOCUMENTS, student, teacher, HEADS, QKV)
    own = [x.clone().requires_grad_() for x in student]
    expected = naive(own, teacher, HEADS)
    torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-5, atol=0)
    wanted = torch.autograd.grad(expected, own)
    torch.testing.assert_close(slopes, list(wanted), rtol=1e-4, atol=1e-6)


def test_relation_heads_are_chosen_or_given() -> None:
    student, teacher = states(0), states(1, (32, 16, 16))
    assert AttentionDistill().heads_for(3, [24, 12, 12], [32, 16, 16]) == 1
    total, _ = AttentionDistill(relation_heads=4).on_projections(
        DOCUMENTS, student, teacher, HEADS, QKV
    )
    torch.testing.assert_close(total.double(), naive(student, teacher, 4), rtol=1e-5, atol=0)
    with pytest.raises(UserError, match=r"8 does not divide the 12 numbers .* a divisor of 4"):
        AttentionDistill(relation_heads=8).on_projections(DOCUMENTS, student, teacher, HEADS, QKV)


@pytest.mark.parametrize("relations", ["qkv", "probabilities"])
def test_identical_states_have_nothing_to_learn(relations: str) -> None:
    objective = AttentionDistill(relations=relations)
    total, slopes = objective.on_projections(DOCUMENTS, states(0), states(0), HEADS, QKV)
    assert total == 0
    assert all(slope is None or slope.abs().max() < 1e-6 for slope in slopes)


def test_padding_and_other_documents_change_nothing() -> None:
    student, teacher = states(0), states(1)
    before, slopes = AttentionDistill().on_projections(DOCUMENTS, student, teacher, HEADS, QKV)
    assert all(slope[~(DOCUMENTS > 0)].eq(0).all() for slope in slopes if slope is not None)
    for x in student:
        x[~(DOCUMENTS > 0)] = 100.0
    assert AttentionDistill().on_projections(DOCUMENTS, student, teacher, HEADS, QKV)[0] == before


@pytest.mark.parametrize("size", [0.0, 1e-20, 1e4])
def test_extreme_states_are_finite(size: float) -> None:
    student, teacher = ([size * x for x in states(seed)] for seed in (0, 1))
    total, slopes = AttentionDistill().on_projections(DOCUMENTS, student, teacher, HEADS, QKV)
    assert total.isfinite() and total >= 0
    assert all(slope is not None and slope.isfinite().all() for slope in slopes)


def test_no_relation_is_ever_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_distill, "TILE", len(ROWS) * HEADS * 9 * 2)
    seen = []
    inner = attention_distill._logits

    def watched(rows: Tensor, keys: Tensor, visible: Tensor) -> Tensor:
        found = inner(rows, keys, visible)
        seen.append(found.shape[2])
        return found

    monkeypatch.setattr(attention_distill, "_logits", watched)
    AttentionDistill().on_projections(DOCUMENTS, states(0), states(1), HEADS, QKV)
    assert max(seen) == 2


def test_maps_of_probabilities_are_those_of_the_definition() -> None:
    """And nearly blind: products of probabilities are small, so all relations are alike."""
    objective = AttentionDistill(relations="probabilities")
    student, teacher = states(0), states(1)
    own = [x.clone().requires_grad_() for x in student]

    def maps(q: Tensor, k: Tensor, head: int, row: list[int]) -> Tensor:
        whole, start = torch.zeros(9, 9, dtype=torch.float64), 0
        at, key_at = head * 6, head // 2 * 6
        for count in row:
            for i in range(start, start + count):
                dots = [q[i, at : at + 6] @ k[j, key_at : key_at + 6] for j in range(start, i + 1)]
                probabilities = (torch.stack(dots) / math.sqrt(6)).softmax(0)
                whole = whole.index_put(
                    (torch.tensor([i]), torch.arange(start, i + 1)), probabilities
                )
            start += count
        return whole

    expected = torch.zeros((), dtype=torch.float64)
    for index, row in enumerate(ROWS[:3]):
        for head in range(4):
            pair = [
                relations(maps(q[index].double(), k[index].double(), head, row), 1, row)
                for q, k in (own[:2], teacher[:2])
            ]
            expected = expected + divergence(*pair) / 4
    total, slopes = objective.on_projections(DOCUMENTS, student, teacher, HEADS, QKV)
    torch.testing.assert_close(total.double(), expected.detach(), rtol=1e-3, atol=1e-6)
    wanted = torch.autograd.grad(expected, own[:2])
    torch.testing.assert_close(slopes[:2], list(wanted), rtol=1e-3, atol=1e-5)
    related = AttentionDistill().on_projections(DOCUMENTS, student, teacher, HEADS, QKV)[0]
    assert total < related / 50
    with pytest.raises(UserError, match="probabilities needs a teacher"):
        objective.on_projections(DOCUMENTS, student, states(1, (32, 16, 16)), HEADS, QKV)

"""Block diffusion and its distillation against naive references; where a guess is looked for."""

import numpy as np
import pytest
import torch

from bitray.models.batch import IGNORED, Batch
from bitray.models.diffusion import MaskedBatch, eligible
from bitray.objectives import DLM, Objectives, TCSDistill
from bitray.training.settings import TrainingSettings

VOCAB, WIDTH = 30, 24
LENGTHS = [[10, 14], [3, 5, 9], [24], []]


def make_batch(rows: int = 1, prompts: list[list[int]] | None = None) -> Batch:
    ids = np.random.default_rng(0).integers(1, VOCAB, (len(LENGTHS) * rows, WIDTH))
    return Batch.from_rows(ids, LENGTHS * rows, [0] * len(ids), prompts)


def drawn(objective: DLM, batch: Batch, seed: int = 0) -> MaskedBatch:
    view = objective.view(batch, torch.Generator().manual_seed(seed))
    assert isinstance(view, MaskedBatch)
    return view


def test_two_views_mask_each_eligible_token_exactly_once_between_them() -> None:
    batch = make_batch(prompts=[[2, 0], [0, 4, 3], [11], []])
    view = drawn(DLM(block=4), batch)
    first, second, clean = view.masked.split(WIDTH, 1)
    assert torch.equal(first ^ second, eligible(batch))
    assert not (first & second).any() and not clean.any()
    assert DLM().count(view) == eligible(batch).sum() == (view.guessed != IGNORED).sum()


@pytest.mark.parametrize(
    ("settings", "lengths"), [({}, 3), ({"complementary": False}, 2), ({"mode": "simple"}, 1)]
)
def test_a_view_is_as_wide_as_it_says(settings: dict[str, object], lengths: int) -> None:
    objective = DLM.model_validate(settings)
    width = drawn(objective, make_batch()).input_ids.shape[1]
    assert objective.lengths == lengths == width / WIDTH


def test_without_complement_there_is_one_copy() -> None:
    view = drawn(DLM(block=4, complementary=False), make_batch())
    assert view.labels.shape == (4, 2 * WIDTH)
    assert DLM().count(view) == view.masked.sum() < eligible(make_batch()).sum()


def test_every_block_has_a_ratio_of_its_own_drawn_evenly() -> None:
    """Of a block of n tokens, all masked or all but none happens with probability 1/(n+1) each,
    as every number of masked tokens does if the ratio is uniform."""
    ids = np.ones((2000, WIDTH), np.int64)
    batch = Batch.from_rows(ids, [[WIDTH]] * 2000, [0] * 2000)
    masked = drawn(DLM(block=6), batch).masked[:, :WIDTH]
    blocks = masked.view(2000, 4, 6)[:, 1:3].flatten(0, 1)  # the outer ones have fewer tokens
    shares = np.bincount(blocks.sum(1).numpy(), minlength=7) / len(blocks)
    np.testing.assert_allclose(shares, 1 / 7, atol=0.025)
    counts = masked.view(2000, 4, 6)[:, 1:3].sum(2).double()
    assert abs(np.corrcoef(counts.T)[0, 1]) < 0.1, "neighbours share nothing"
    assert abs(blocks.double().mean(0) - 0.5).max() < 0.04, "no place of a block is preferred"


def test_documents_of_a_row_have_blocks_of_their_own() -> None:
    """Tokens of two documents in the same columns of one grid are not masked together."""
    ids = np.ones((3000, 8), np.int64)
    batch = Batch.from_rows(ids, [[4, 4]] * 3000, [0] * 3000)
    masked = drawn(DLM(block=8), batch).masked[:, :8].double()
    correlation = np.corrcoef(masked[:, [1, 2, 5, 6]].T)
    assert correlation[0, 1] > 0.2 and correlation[2, 3] > 0.2
    assert abs(correlation[:2, 2:]).max() < 0.08


def test_the_generator_decides() -> None:
    batch = make_batch()
    one, same, other = (drawn(DLM(block=4), batch, seed).masked for seed in (0, 0, 1))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_the_simple_mode_is_causal_and_masks_so_many() -> None:
    batch = make_batch(rows=100)
    view = drawn(DLM(mode="simple"), batch)
    assert view.attention_mask() is None and view.clean is None
    assert view.labels.shape == batch.labels.shape
    share = DLM().count(view) / eligible(batch).sum()
    assert share.item() == pytest.approx(0.15, abs=0.02)
    expected = torch.full_like(view.guessed, IGNORED)
    for row, column in view.masked.nonzero().tolist():
        expected[row, column - 1] = batch.input_ids[row, column]
    assert torch.equal(view.guessed, expected)


def test_a_row_of_padding_has_nothing_to_guess() -> None:
    batch = Batch.from_rows(np.zeros((2, 8), np.int64), [[], []], [0, 0])
    assert DLM().count(drawn(DLM(), batch)) == 0


# ---------------------------------------------------------------------------------------- values


def softmax(z: np.ndarray) -> np.ndarray:
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def test_the_value_is_the_surprise_at_masked_tokens() -> None:
    rng = np.random.default_rng(0)
    z, labels = 3 * rng.normal(size=(9, VOCAB)), rng.integers(0, VOCAB, 9)
    labels[[1, 5]] = IGNORED
    expected = -sum(np.log(softmax(row)[label]) for row, label in zip(z, labels, strict=True)
                    if label != IGNORED)  # fmt: skip
    loss, _ = DLM().on_logits(torch.tensor(z).float(), torch.tensor(labels), None)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_tcs_is_the_divergence_of_the_likeliest_and_one_bucket_at_5_degrees() -> None:
    rng = np.random.default_rng(0)
    student, teacher = (3 * rng.normal(size=(4, 300)) for _ in range(2))
    expected = 0.0
    for z_s, z_t in zip(student, teacher, strict=True):
        q, p = softmax(z_s / 5), softmax(z_t / 5)
        top = np.argsort(-p)[:100]
        parts = [np.append(x[top], 1 - x[top].sum()) for x in (p, q)]
        expected += 25 * (parts[0] * np.log(parts[0] / parts[1])).sum()
    inputs = torch.tensor(student).float(), torch.arange(4), torch.tensor(teacher).float()
    loss, _ = TCSDistill().on_logits(*inputs)
    assert loss.item() == pytest.approx(expected, rel=1e-4)


def test_tcs_needs_what_dlm_masks() -> None:
    with pytest.raises(ValueError, match=r"tcs_distill compares what dlm masks, .* weight 0"):
        Objectives(tcs_distill=TCSDistill())
    both = Objectives(tcs_distill=TCSDistill(), dlm=DLM(weight=0.0))
    assert TrainingSettings(max_steps=1, objectives=both).needs_mask_token
    neither = Objectives(dlm=DLM(weight=0.0))
    assert not TrainingSettings(max_steps=1, objectives=neither).needs_mask_token

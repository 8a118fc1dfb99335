"""The mask of block diffusion against its definition, and what a masked view lets through."""

from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_models import VOCABULARY, make_batch, make_model
from torch import Tensor

from bitray.models import losses
from bitray.models.batch import IGNORED, Batch
from bitray.models.convert import to_bitnet
from bitray.models.diffusion import CLEAN, MaskedBatch, eligible, masked_batch
from bitray.models.families import FAMILIES
from bitray.models.isolation import check_documents_isolated
from bitray.models.losses import LossModel, TeacherOutput, Term, run_teacher
from bitray.models.packed import last_hidden
from bitray.objectives import DLM, AttentionDistill, ContinuePretrain, HiddenDistill, TCSDistill
from bitray.settings import UserError

MASK_TOKEN = VOCABULARY - 1
WIDTH = 16


@st.composite
def rows(draw: st.DrawFn) -> list[list[int]]:
    """Lengths of the documents of two rows; what is left is padding."""
    found = []
    for _ in range(2):
        lengths, left = [], WIDTH
        while left and draw(st.booleans()):
            lengths.append(draw(st.integers(1, left)))
            left -= lengths[-1]
        found.append(lengths)
    return found


def random_view(lengths: list[list[int]], block: int | None, copies: int = 2) -> MaskedBatch:
    batch = make_batch(lengths, WIDTH)
    draw = torch.rand(batch.labels.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    masks = [eligible(batch) & draw, eligible(batch) & ~draw][:copies]
    return masked_batch(batch, masks, block)


def in_order(lengths: list[int]) -> list[tuple[int, int]]:
    """(document, position in it) of every column of a row, padding as a document of its own."""
    padded = [*lengths, WIDTH - sum(lengths)]
    return [(number, place) for number, n in enumerate(padded) for place in range(n)]


@given(rows(), st.integers(1, 7), st.integers(1, 2))
def test_the_mask_is_its_definition(lengths: list[list[int]], block: int, copies: int) -> None:
    view = random_view(lengths, block, copies)
    found = view.attention_mask()
    assert found is not None
    for row, documents in enumerate(lengths):
        tokens = [(copy, *token) for copy in [*range(copies), CLEAN]
                  for token in in_order(documents)]  # fmt: skip
        for i, j in product(range(len(tokens)), repeat=2):
            (mine, document, place), (other, its_document, its_place) = tokens[i], tokens[j]
            if document != its_document:
                sees = False
            elif mine == CLEAN:
                sees = other == CLEAN and its_place <= place
            elif other == CLEAN:
                sees = its_place // block < place // block
            else:
                sees = other == mine and its_place // block == place // block
            assert found[row, 0, i, j] == sees, (tokens[i], tokens[j])


@given(rows(), st.integers(1, 7))
def test_every_masked_token_is_guessed_once_where_its_shift_says(
    lengths: list[list[int]], block: int
) -> None:
    """From the token before it in its own copy; the first of a block from the clean copy."""
    view, batch = random_view(lengths, block), make_batch(lengths, WIDTH)
    expected = torch.full_like(view.guessed, IGNORED)
    for row, column in eligible(batch).nonzero().tolist():
        place = int(batch.position_ids[row, column])
        copy = 0 if view.masked[row, column] else 1
        at = 2 if place % block == 0 else copy
        expected[row, at * WIDTH + column - 1] = batch.input_ids[row, column]
    assert torch.equal(view.guessed, expected)
    assert torch.equal(view.input_ids, batch.input_ids.repeat(1, 3))
    assert torch.equal(view.position_ids, batch.position_ids.repeat(1, 3))
    assert view.clean == slice(2 * WIDTH, 3 * WIDTH)
    for name in ("labels", "real", "input_ids"):
        assert torch.equal(getattr(view, name)[:, view.clean], getattr(batch, name)), name
    assert not view.real[:, : 2 * WIDTH].any()
    assert (view.labels[:, : 2 * WIDTH] == IGNORED).all()


def test_first_and_last_tokens_prompts_and_padding_are_never_masked() -> None:
    ids = np.arange(1, 25, dtype=np.int64).reshape(2, 12)
    batch = Batch.from_rows(ids, [[5, 4], [12]], [0, 0], [[0, 2], [7]])
    assert eligible(batch).nonzero().tolist() == [
        [0, 1], [0, 2], [0, 3], [0, 7], *([1, k] for k in range(7, 11))
    ]  # fmt: skip


def test_places_of_a_view_come_from_places_of_its_batch() -> None:
    view = random_view([[16], [7, 9]], 4)
    width = view.labels.shape[1]
    places = torch.arange(2 * width)
    expected = [row * WIDTH + column % WIDTH for row in range(2) for column in range(width)]
    assert view.origin(places).tolist() == expected


# ------------------------------------------------------------------------------- through a model


def model(kind: str = "llama") -> LossModel:
    made = to_bitnet(make_model(kind))
    made.config.mask_token_id = MASK_TOKEN
    return LossModel(made.eval())


def hidden(wrapped: LossModel, view: Batch) -> Tensor:
    with torch.no_grad():
        return last_hidden(wrapped.model, view)


LENGTHS = [[7, 9], [16], [3, 5, 4]]


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_clean_half_is_the_batch_alone(kind: str) -> None:
    wrapped, view = model(kind), random_view(LENGTHS, 4)
    states = hidden(wrapped, view)[:, view.clean]
    torch.testing.assert_close(states, hidden(wrapped, make_batch(LENGTHS, WIDTH)))


def test_copies_that_share_a_clean_half_are_copies_with_one_each() -> None:
    """Three lengths instead of four are the same mathematics."""
    wrapped, batch = model(), make_batch(LENGTHS, WIDTH)
    view = random_view(LENGTHS, 4)
    together = hidden(wrapped, view)
    for copy in range(2):
        columns = slice(copy * WIDTH, (copy + 1) * WIDTH)
        alone = hidden(wrapped, masked_batch(batch, [view.masked[:, columns]], 4))
        torch.testing.assert_close(together[:, columns], alone[:, :WIDTH])


def test_a_block_reads_nothing_else_than_its_document_up_to_it() -> None:
    """One noisy block after the clean tokens before it, alone and with transformers' own mask."""
    wrapped, block = model(), 4
    view = random_view([[16]], block)
    together = hidden(wrapped, view)
    ids = view.input_ids.masked_fill(view.masked, MASK_TOKEN)
    for start in range(0, WIDTH, block):
        alone = torch.cat([ids[:1, 2 * WIDTH :][:, :start], ids[:1, start : start + block]], 1)
        seen = torch.ones(start + block, start + block).tril().bool()
        seen[start:, start:] = True
        with torch.no_grad():
            states = wrapped.model.base_model(
                input_ids=alone, attention_mask=seen[None, None], use_cache=False
            ).last_hidden_state
        torch.testing.assert_close(together[:1, start : start + block], states[:, start:])


def test_cross_entropy_in_the_same_forward_is_cross_entropy() -> None:
    wrapped, batch = model(), make_batch(LENGTHS, WIDTH)
    results = []
    for seen in (batch, random_view(LENGTHS, 4)):
        wrapped.zero_grad()
        loss, metrics = wrapped(seen, [Term("ce", ContinuePretrain(), 0.1)], sources=1)
        loss.backward()
        gradients = [p.grad.clone() for p in wrapped.parameters() if p.grad is not None]
        results.append((loss.detach(), metrics["by_source"], gradients))
        assert ContinuePretrain().count(seen) == metrics["by_source"][1].sum()
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_no_gradient_crosses_a_border_and_none_comes_from_what_is_to_be_guessed() -> None:
    """Of the guess of one token: from where in the view do gradients come?"""
    wrapped, block = model(), 4
    view = random_view([[7, 9], [16]], block)
    embedded: list[Tensor] = []

    def keep(_module: Any, _args: Any, out: Tensor) -> None:
        out.retain_grad()
        embedded.append(out)

    wrapped.model.model.embed_tokens.register_forward_hook(keep)
    place = int((view.guessed[0, :WIDTH] != IGNORED).nonzero().max())  # in the second document
    last_hidden(wrapped.model, view)[0, place].sum().backward()
    reached = (embedded[0].grad.abs().sum(-1) > 0)[0].nonzero()[:, 0].tolist()
    position = place - 7
    first = 7 + position // block * block
    mine = list(range(first, min(first + block, WIDTH)))
    clean = [2 * WIDTH + k for k in range(7, first)]
    assert reached == mine + clean


# --------------------------------------------------------------------------------- planted logits

LOUD = 40.0


def one_hot(tokens: Tensor) -> Tensor:
    return torch.nn.functional.one_hot(tokens, VOCABULARY).float()


@pytest.mark.parametrize("off", [-1, 0, 1])
def test_a_planted_logit_is_found_at_its_place_and_not_one_off(
    off: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Hidden states that say one token loudly, through a head that is the identity. Student and
    teacher each say the next token; the student only where it has to, elsewhere nonsense."""
    block = 4
    heads = {"num_attention_heads": 1, "num_key_value_heads": 1, "head_dim": 16}
    wrapped = LossModel(make_model(hidden_size=VOCABULARY, tie_word_embeddings=False, **heads))
    with torch.no_grad():
        wrapped.model.lm_head.weight.copy_(LOUD * torch.eye(VOCABULARY))
    batch = make_batch(LENGTHS, WIDTH)
    view = DLM(block=block).view(batch, torch.Generator().manual_seed(0))
    said = torch.zeros_like(view.input_ids)
    for row, column in eligible(batch).nonzero().tolist():
        copy = 0 if view.masked[row, column] else 1
        at = 2 if batch.position_ids[row, column] % block == 0 else copy
        said[row, at * WIDTH + column - 1] = batch.input_ids[row, column]
    monkeypatch.setattr(losses, "last_hidden", lambda *_: one_hot(said.roll(off, 1)))
    following = batch.input_ids.roll(-1, 1)
    for shift in (0, 1):
        told = TeacherOutput(one_hot(following.roll(shift, 1)), LOUD * torch.eye(VOCABULARY))
        terms = [Term("dlm", DLM(), 1.0), Term("tcs", TCSDistill(), 1.0)]
        _, metrics = wrapped(view, terms, [], told)
        guess, tcs = (metrics[f"{name}/sum"] / DLM().count(view) for name in ("dlm", "tcs"))
        assert (guess < 1e-3) == (off == 0) and (off == 0 or guess > 0.8 * LOUD)
        assert (tcs < 1e-3) == (off == shift == 0), (off, shift)


def test_where_the_causal_half_alone_decides_it_is_the_autoregressive_loss() -> None:
    """Blocks of one token: each is predicted by the clean tokens before it, whatever the ratio."""
    wrapped, batch = model(), make_batch(LENGTHS, WIDTH)
    view = DLM(block=1).view(batch, torch.Generator().manual_seed(0))
    _, metrics = wrapped(view, [Term("dlm", DLM(), 1.0)])
    only = replace(batch, labels=torch.where(eligible(batch), batch.labels, IGNORED))
    _, expected = wrapped(only, [Term("ce", ContinuePretrain(), 1.0)])
    torch.testing.assert_close(metrics["dlm/sum"], expected["ce/sum"])


def test_nothing_to_guess_costs_nothing_and_stays_differentiable() -> None:
    empty = make_batch([[], []], WIDTH)
    wrapped, view = model(), DLM(block=4).view(empty, torch.Generator())
    told = run_teacher(make_model(), empty, layers=False)
    terms = [Term("dlm", DLM(), 1.0), Term("tcs", TCSDistill(), 1.0)]
    loss, metrics = wrapped(view, [*terms, Term("ce", ContinuePretrain(), 1.0)], [], told)
    loss.backward()
    assert loss == 0 and not any(value.any() for value in metrics.values())
    assert all(p.grad is not None and not p.grad.any() for p in wrapped.parameters())


def test_layers_and_attention_are_compared_in_the_clean_half() -> None:
    """And so give what they give without block diffusion."""
    wrapped, batch = model(), make_batch(LENGTHS, WIDTH)
    terms, found = [Term("hidden", HiddenDistill(), 1.0)], []
    attention = Term("attention", AttentionDistill(), 1.0)
    for seen in (batch, random_view(LENGTHS, 4)):
        told = run_teacher(make_model(seed=1), batch, layers=True, attention=-1)
        loss, sums = wrapped(seen, [], terms, told, attention=attention)
        query = wrapped.model.model.layers[-1].self_attn.q_proj.weight
        slope = torch.autograd.grad(loss, query)[0]
        found.append([loss, slope, sums["hidden/sum"], sums["attention/sum"]])
        for objective in (HiddenDistill(), AttentionDistill()):
            assert objective.count(seen) == sum(map(sum, LENGTHS))
    torch.testing.assert_close(*found)
    assert found[0][3] > 0


# ------------------------------------------------------------------------------------ self-check


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_self_check_passes(kind: str) -> None:
    check_documents_isolated(model(kind), "cpu")


def test_the_self_check_notices_an_answer_that_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """For instance a noisy block that sees the clean tokens of its own block."""
    true = MaskedBatch.attention_mask

    def leaking(view: MaskedBatch) -> Tensor:
        mask = true(view).clone()
        mask[..., 0, view.clean.start + 2] = True
        return mask

    monkeypatch.setattr(MaskedBatch, "attention_mask", leaking)
    with pytest.raises(UserError, match="block diffusion sees what it is to guess"):
        check_documents_isolated(model(), "cpu")


def test_the_self_check_notices_a_mask_that_is_ignored() -> None:
    wrapped = model()
    base = wrapped.model.base_model.forward
    wrapped.model.base_model.forward = lambda **inputs: base(**{**inputs, "attention_mask": None})
    with pytest.raises(UserError, match=r"does not see the text before its block: .*sdpa"):
        check_documents_isolated(wrapped, "cpu")


def test_without_a_mask_token_there_is_no_block_diffusion() -> None:
    view = DLM(block=4).view(make_batch(LENGTHS, WIDTH), torch.Generator())
    with pytest.raises(UserError, match=r"this model has no mask token, .*dlm"):
        LossModel(make_model())(view, [Term("dlm", DLM(), 1.0)])

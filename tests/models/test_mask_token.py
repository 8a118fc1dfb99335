"""A mask token in tokenizer and embeddings: where its row comes from, and that it is kept."""

from pathlib import Path

import pytest
import torch
from tiny_models import make_batch, make_model
from transformers import PreTrainedTokenizerFast

from bitray.data.tokenizer import check_vocabulary, train_tokenizer
from bitray.models.batch import IGNORED
from bitray.models.convert import to_bitnet
from bitray.models.loading import load_model, load_tokenizer, save_model
from bitray.models.losses import LossModel, Term, run_teacher
from bitray.models.mask_token import MASK, add_mask_token, mask_token_id
from bitray.models.packed import packed_inputs
from bitray.objectives import DLM, ContinuePretrain, LogitsDistill, TCSDistill
from bitray.settings import UserError

SIZE = 270


def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["some words and some more words"] * 3, SIZE)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("rows", "expected"), [(SIZE, 320), (SIZE + 1, SIZE + 1), (384, 384)])
def test_a_free_row_is_taken_before_embeddings_grow(tied: bool, rows: int, expected: int) -> None:
    """The logits of all other tokens stay as they are, and so does the tie."""
    model, words = make_model(vocab_size=rows, tie_word_embeddings=tied), tokenizer()
    batch = make_batch([[10, 12], [32]])
    before = model(**packed_inputs(batch)).logits
    add_mask_token(model, words)
    add_mask_token(model, words)
    assert (mask_token_id(model.config), words.mask_token_id) == (SIZE, SIZE)
    assert words.convert_ids_to_tokens(SIZE) == MASK
    assert model.config.vocab_size == len(model.get_input_embeddings().weight) == expected
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    check_vocabulary(words, model.config.vocab_size)
    after = model(**packed_inputs(batch)).logits
    torch.testing.assert_close(after[..., :rows], before)
    if expected > rows:
        mean = before.mean(-1, keepdim=True).expand(*before.shape[:2], expected - rows)
        torch.testing.assert_close(after[..., rows:], mean, rtol=1e-3, atol=1e-5)


def test_it_is_kept_with_model_and_tokenizer(tmp_path: Path) -> None:
    model, words = to_bitnet(make_model(vocab_size=SIZE, tie_word_embeddings=True)), tokenizer()
    add_mask_token(model, words)
    save_model(model, str(tmp_path), words)
    again, read = load_model(str(tmp_path)), load_tokenizer(str(tmp_path))
    assert (mask_token_id(again.config), read.mask_token_id) == (SIZE, SIZE)
    batch = make_batch([[10, 12], [32]])
    view = DLM(block=4).view(batch, torch.Generator())
    losses = [LossModel(m)(view, [Term("dlm", DLM(), 1.0)])[0] for m in (model, again)]
    torch.testing.assert_close(*losses)


def test_a_reserved_token_is_used_if_it_is_named() -> None:
    model, words = make_model(vocab_size=SIZE + 4), tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|r0|>", "<|r1|>"]})
    add_mask_token(model, words, "<|r1|>")
    assert (mask_token_id(model.config), words.mask_token) == (SIZE + 1, "<|r1|>")
    assert len(words) == SIZE + 2


@pytest.mark.parametrize("text", ["<|endoftext|>", "<|pad|>", "s"])
def test_a_token_that_means_something_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"model.mask_token: .* already means something"):
        add_mask_token(make_model(vocab_size=SIZE), tokenizer(), text)


def test_a_teacher_without_the_token_still_teaches() -> None:
    """What it never says has probability 0 in its distribution, and is a sum less."""
    model, teacher = make_model(vocab_size=SIZE), make_model(vocab_size=SIZE, seed=1).eval()
    add_mask_token(model, tokenizer())
    batch = make_batch([[10, 12], [32]])
    learnt = batch.predicted() != IGNORED
    with torch.no_grad():
        student_logp = model(**packed_inputs(batch)).logits[learnt].div(2).log_softmax(-1)
        teacher_logp = teacher(**packed_inputs(batch)).logits[learnt].div(2).log_softmax(-1)
    expected = 4 * (teacher_logp.exp() * (teacher_logp - student_logp[:, :SIZE])).sum()
    view = DLM(block=4).view(batch, torch.Generator())
    terms = [Term("ce", ContinuePretrain(), 1.0), Term("kl", LogitsDistill(), 1.0),
             Term("tcs", TCSDistill(top_k=SIZE + 5), 1.0)]  # fmt: skip
    loss, metrics = LossModel(model)(view, terms, [], run_teacher(teacher, batch, False))
    loss.backward()
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    torch.testing.assert_close(metrics["kl/sum"], expected)
    assert metrics["tcs/sum"] > 0


def test_a_teacher_of_another_vocabulary_is_still_refused() -> None:
    model, teacher = make_model(vocab_size=SIZE + 1), make_model(vocab_size=SIZE + 2).eval()
    batch, terms = make_batch([[32]]), [Term("kl", LogitsDistill(), 1.0)]
    add_mask_token(model, tokenizer())
    with pytest.raises(UserError, match=r"vocabulary has 272 entries, the student's 271"):
        LossModel(model)(batch, terms, [], run_teacher(teacher, batch, False))

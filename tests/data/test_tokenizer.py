"""Tokenizers: exactly as many tokens as asked, text comes back, and no text can end a document."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from bitray.data import check_vocabulary, embedded, tokenizer_identity, train_tokenizer
from bitray.data import tokenizer as module
from bitray.data.tokenizer import Encoder, backend_json, end_token_id
from bitray.settings import UserError

VOCABULARY = 600


def corpus() -> list[str]:
    return list(embedded.documents("prose", max_bytes=100_000))


TRAINED = train_tokenizer(corpus(), VOCABULARY)


def encoder() -> Encoder:
    return Encoder(backend_json(TRAINED), end_token_id(TRAINED))


def test_it_has_exactly_the_tokens_asked_for():
    assert len(TRAINED) == VOCABULARY
    assert sorted(TRAINED.get_vocab().values()) == list(range(VOCABULARY))
    assert (TRAINED.eos_token_id, TRAINED.bos_token_id, TRAINED.pad_token_id) == (0, 0, 1)


def test_the_same_texts_give_the_same_tokenizer():
    assert tokenizer_identity(train_tokenizer(corpus(), VOCABULARY)) == tokenizer_identity(TRAINED)
    assert tokenizer_identity(train_tokenizer(corpus(), 500)) != tokenizer_identity(TRAINED)


def test_saving_and_using_it_does_not_change_its_identity(tmp_path):
    identity = tokenizer_identity(TRAINED)
    TRAINED.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    loaded(["a", "a long one"], padding=True, truncation=True, max_length=4)
    assert tokenizer_identity(loaded) == identity
    assert (loaded.eos_token, loaded.pad_token) == (TRAINED.eos_token, TRAINED.pad_token)


@given(st.text())
def test_any_text_comes_back(text):
    text = text.encode("utf-8", "ignore").decode()
    ids = encoder().encode([text])[0]
    assert ids.dtype == np.int32
    assert ids[-1] == TRAINED.eos_token_id
    assert (ids < VOCABULARY).all()
    assert TRAINED.decode(ids[:-1]) == text


def test_a_text_that_spells_the_end_token_does_not_end():
    ids = encoder().encode([f"a{TRAINED.eos_token}b{TRAINED.pad_token}"])[0]
    assert list(ids).count(TRAINED.eos_token_id) == 1
    assert TRAINED.pad_token_id not in ids


def test_digits_are_single_tokens_as_llama_cpp_splits_them():
    tokens = TRAINED.convert_ids_to_tokens(encoder().encode(["12345 678"])[0])
    assert [t for t in tokens if t.isdigit()] == list("12345678")


def test_long_texts_give_the_same_ids_in_slices(monkeypatch):
    text = "\n".join(corpus())[:60_000]
    whole = encoder().encode([text, "short"])
    monkeypatch.setattr(module, "SLICE", 5_000)
    sliced = encoder().encode([text, "short"])
    assert all(np.array_equal(a, b) for a, b in zip(whole, sliced, strict=True))
    unbroken = encoder().encode(["x" * 12_000])[0]
    assert TRAINED.decode(unbroken[:-1]) == "x" * 12_000


def test_impossible_vocabularies_are_refused():
    with pytest.raises(UserError, match="too small"):
        train_tokenizer(corpus(), 200)
    with pytest.raises(UserError, match="yields only"):
        train_tokenizer(["a b a b"], 2000)


def test_a_tokenizer_bigger_than_the_embedding_is_refused():
    check_vocabulary(TRAINED, VOCABULARY)
    with pytest.raises(UserError, match=f"{VOCABULARY} tokens .* only 512 rows; .*id 512"):
        check_vocabulary(TRAINED, 512)


def test_a_tokenizer_without_an_end_is_refused():
    copy = train_tokenizer(corpus(), VOCABULARY)
    copy.eos_token = None
    with pytest.raises(UserError, match="no eos_token"):
        end_token_id(copy)

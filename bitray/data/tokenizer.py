"""Tokenizers: training a byte-level BPE one, its identity, whether a model can hold it, encoding.

The pre-tokeniser is SmolLM's: single digits, then GPT-2's expression. llama.cpp knows it by the
name `smollm`, so an exported GGUF splits text exactly as training did.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from bitray.settings import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

END = "<|endoftext|>"
PAD = "<|pad|>"
SLICE = 1 << 20
"""Characters encoded at once: an encoding takes about 100 bytes per token while it exists."""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> "PreTrainedTokenizerFast":
    """A byte-level BPE tokenizer of exactly `vocab_size` tokens, the same for the same texts.

    Ids 0 and 1 are `<|endoftext|>` (also the beginning, as in GPT-2) and `<|pad|>`. `UserError` if
    `vocab_size` cannot hold those and 256 bytes, or the texts do not yield so many tokens.
    """
    from transformers import PreTrainedTokenizerFast

    alphabet = pre_tokenizers.ByteLevel.alphabet()
    least = len(alphabet) + 2
    if vocab_size < least:
        raise UserError(
            f"a tokenizer of {vocab_size} tokens is too small: bytes alone take {least}"
        )
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END, PAD],
        initial_alphabet=sorted(alphabet),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    found = backend.get_vocab_size()
    if found != vocab_size:
        raise UserError(
            f"the training text yields only {found} different tokens, not {vocab_size}; "
            f"give more text or a vocabulary of at most {found}"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
    )


def backend_json(tokenizer: "PreTrainedTokenizerBase") -> str:
    """The fast tokenizer behind it, as JSON: without padding and truncation, which calls leave set.

    `UserError` if there is none.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{tokenizer.name_or_path}: has no fast tokenizer (tokenizer.json)")
    values = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    return json.dumps(values, sort_keys=True, ensure_ascii=False)


def tokenizer_identity(tokenizer: "PreTrainedTokenizerBase") -> str:
    """sha256 of all that decides which ids a text gets, and the end-of-text id."""
    content = f"{backend_json(tokenizer)} {tokenizer.eos_token_id}"
    return hashlib.sha256(content.encode()).hexdigest()


def end_token_id(tokenizer: "PreTrainedTokenizerBase") -> int:
    """The id that ends every document. `UserError` if the tokenizer has none."""
    if tokenizer.eos_token_id is None:
        raise UserError(f"{tokenizer.name_or_path}: the tokenizer names no eos_token")
    return tokenizer.eos_token_id


def vocabulary(tokenizer: "PreTrainedTokenizerBase") -> int:
    """One more than the highest id that it can give."""
    return 1 + max(tokenizer.get_vocab().values())


def check_vocabulary(tokenizer: "PreTrainedTokenizerBase", vocab_size: int) -> None:
    """`UserError` if the tokenizer can give ids that an embedding of `vocab_size` rows lacks."""
    needed = vocabulary(tokenizer)
    if needed > vocab_size:
        token = tokenizer.convert_ids_to_tokens(vocab_size)
        raise UserError(
            f"the tokenizer has {needed} tokens but the model's embedding only {vocab_size} rows; "
            f"the first without one is {token!r} (id {vocab_size})"
        )


class Encoder:
    """Text to token ids with the end token appended: what runs in preparing workers."""

    def __init__(self, backend: str, end: int) -> None:
        self._tokenizer = Tokenizer.from_str(backend)
        # In text, "<|endoftext|>" is thirteen characters: no document may end itself.
        self._tokenizer.encode_special_tokens = True
        self._end = end

    def encode(self, texts: Sequence[str], end: bool = True) -> list[np.ndarray]:
        """int32 ids of each text, in order; `end`: with the end token, which a prompt has not."""
        short = all(len(text) <= SLICE for text in texts)
        found = self._batch(texts) if short else [self._long(text) for text in texts]
        return [np.append(ids, np.int32(self._end)) for ids in found] if end else found

    def _batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        encodings = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, np.int32) for encoding in encodings]

    def _long(self, text: str) -> np.ndarray:
        return np.concatenate([self._batch([piece])[0] for piece in _slices(text)])


def _slices(text: str) -> Iterator[str]:
    """A long text in pieces, cut before the space of a word, where byte-level BPE cuts anyway."""
    start = 0
    while len(text) - start > SLICE:
        stop = start + SLICE
        at = next((k for k in range(stop, stop - 1000, -1) if _between_words(text, k)), stop)
        yield text[start:at]
        start = at
    yield text[start:]


def _between_words(text: str, at: int) -> bool:
    return text[at] == " " and text[at - 1].isalpha() and text[at + 1 : at + 2].isalpha()

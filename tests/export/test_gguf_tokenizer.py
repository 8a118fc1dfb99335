"""GGUF tokenizer fields: the right pre-tokenizer by name, or a refusal."""

import pytest
from gguf_models import make_tokenizer
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from bitray.export.tokenizer import CONTROL, NORMAL, UNUSED, tokenizer_fields
from bitray.settings import UserError


@pytest.mark.parametrize("pre", ["gpt-2", "smollm", "qwen2", "llama-bpe"])
def test_known_pre_tokenizers_are_found_by_their_definition(pre: str):
    tokenizer = make_tokenizer(pre)
    fields = tokenizer_fields(tokenizer, 512)
    assert fields.pre == pre
    assert len(fields.tokens) == len(fields.types) == 512
    assert fields.tokens[:2] == ["<|endoftext|>", "<|pad|>"] and fields.types[:2] == [CONTROL] * 2
    assert fields.types[len(tokenizer)] == UNUSED and fields.types[len(tokenizer) - 1] == NORMAL
    assert fields.special == {"bos": 0, "eos": 0, "padding": 1}
    assert not fields.add_bos and not fields.add_eos
    first, second = fields.merges[0].split(" ")
    assert first + second in fields.tokens


def test_bos_and_eos_are_added_as_hugging_face_adds_them():
    tokenizer = make_tokenizer("gpt-2")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    tokenizer.bos_token = "<|endoftext|>"
    fields = tokenizer_fields(tokenizer, 512)
    assert fields.add_bos and not fields.add_eos


def wrap(pre: pre_tokenizers.PreTokenizer) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE(vocab={"a": 0, "b": 1}, merges=[]))
    tokenizer.pre_tokenizer = pre
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.mark.parametrize(
    "pre",
    [
        pre_tokenizers.Whitespace(),
        pre_tokenizers.ByteLevel(add_prefix_space=True),
        pre_tokenizers.Sequence(
            [
                pre_tokenizers.Split(Regex(r"\p{N}{1,2}"), "isolated"),
                pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            ]
        ),
    ],
)
def test_other_pre_tokenizers_are_refused_with_their_definition(pre):
    with pytest.raises(UserError, match="no pre-tokenizer equal to"):
        tokenizer_fields(wrap(pre), 4)


def test_a_normalizer_that_llama_cpp_lacks_is_refused():
    tokenizer = make_tokenizer("gpt-2")
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(UserError, match="Lowercase"):
        tokenizer_fields(tokenizer, 512)


def test_only_byte_level_bpe_is_written():
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    )
    with pytest.raises(UserError, match="only byte-level BPE"):
        tokenizer_fields(tokenizer, 4)


def test_a_tokenizer_bigger_than_the_embedding_is_refused():
    with pytest.raises(UserError, match="id 499 has no embedding; the model has 100"):
        tokenizer_fields(make_tokenizer("gpt-2"), 100)

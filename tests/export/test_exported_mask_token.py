"""The mask token of block diffusion goes with a model into every form that it is exported to."""

from pathlib import Path

import pytest
import torch
from gguf import GGUFReader
from gguf_models import make_model
from transformers import AutoConfig, AutoTokenizer

from bitray.export import write_gguf, write_huggingface
from bitray.models.mask_token import add_mask_token


@pytest.mark.parametrize(("rows", "expected"), [(None, 512), (500, 512)])
def test_exports_carry_it(rows: int | None, expected: int, tmp_path: Path) -> None:
    """In a free row of the embedding, or in one that it grew by."""
    model, tokenizer = make_model("llama")
    if rows:
        model.resize_token_embeddings(rows, mean_resizing=False)
    add_mask_token(model, tokenizer)
    model.config.diffusion_block = 16
    assert model.config.vocab_size == expected
    write_gguf(model, tokenizer, tmp_path / "m.gguf", "f16")
    reader = GGUFReader(tmp_path / "m.gguf")
    assert reader.fields["tokenizer.ggml.mask_token_id"].contents() == 500
    assert reader.fields["tokenizer.ggml.tokens"].contents()[500] == "<|mask|>"
    assert len(reader.fields["tokenizer.ggml.tokens"].contents()) == expected
    torch.compiler.set_stance("force_eager")
    write_huggingface(model, tokenizer, tmp_path / "hf")
    torch.compiler.set_stance("default")
    config = AutoConfig.from_pretrained(tmp_path / "hf")
    assert (config.mask_token_id, config.diffusion_block, config.vocab_size) == (500, 16, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").mask_token_id == 500

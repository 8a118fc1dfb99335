"""Folders that stock transformers loads: the same logits, the same codes, and a card."""

import copy
import json

import pytest
import torch
from export_helpers import logits, relative
from gguf_models import make_model, make_tokenizer
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.integrations import bitnet as stock

from bitray.export import ExportError, ModelCard, write_huggingface
from bitray.export.huggingface import _check
from bitray.export.reference import dequantized
from bitray.models import build_model, to_bitnet
from bitray.nn import set_strength
from bitray.settings import UserError

FIELDS = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    "initializer_range": 0.15, "tie_word_embeddings": True, "eos_token_id": 0,
}  # fmt: skip

FORMS = {
    "llama": ("llama", "none", {}, "LlamaForCausalLM"),
    "llama, SubLN": ("llama", "paper", {}, "BitNetForCausalLM"),
    "llama, SubLN, untied, biased": (
        "llama", "paper", {"tie_word_embeddings": False, "attention_bias": True},
        "BitNetForCausalLM",
    ),
    "llama, SubLN, wide heads": ("llama", "paper", {"head_dim": 32}, "LlamaForCausalLM"),
    "llama, SubLN everywhere": ("llama", "all", {}, "LlamaForCausalLM"),
    "qwen2": ("qwen2", "none", {}, "Qwen2ForCausalLM"),
    "qwen2, SubLN": ("qwen2", "paper", {}, "Qwen2ForCausalLM"),
    "qwen3": ("qwen3", "none", {"head_dim": 32}, "Qwen3ForCausalLM"),
    "qwen3, SubLN": ("qwen3", "paper", {"head_dim": 32}, "Qwen3ForCausalLM"),
}  # fmt: skip


class _Float:
    """In place of the stock activation quantiser: activations stay as they are."""

    @staticmethod
    def apply(x: torch.Tensor) -> torch.Tensor:
        return x


@pytest.fixture(autouse=True)
def eager():
    """Stock transformers compiles its unpacking, which takes longer than everything here."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def make(form: str):
    model_type, subln, changes, _ = FORMS[form]
    torch.manual_seed(0)
    model = to_bitnet(build_model({"model_type": model_type, **FIELDS, **changes}), subln=subln)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 0.0 if name.endswith("bias") else 1.0
                parameter.copy_(center + 0.2 * torch.randn_like(parameter))
            elif "embed_tokens" in name:
                parameter.mul_(0.02)  # so small that the eps of the first norm counts
    return model.eval()


@pytest.mark.parametrize("mode", ["offline", "online"])
@pytest.mark.parametrize("form", FORMS)
def test_stock_transformers_gives_our_logits(form, mode, ids, tmp_path, monkeypatch):
    model = make(form)
    report = write_huggingface(model, make_tokenizer("gpt-2"), tmp_path / "hf", mode=mode)
    loaded, notes = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", output_loading_info=True)
    assert type(loaded).__name__ == FORMS[form][3] == report.architecture
    assert not any(notes.values()), notes
    assert report.mismatches == 0 and report.ternary_tensors == 14
    # a single int8 code that rounds the other way is worth 1e-3, so both are compared:
    assert relative(logits(loaded, ids), logits(model, ids)) < 2e-2
    monkeypatch.setattr(stock, "ActQuant", _Float)
    assert relative(logits(loaded, ids), logits(dequantized(model), ids)) < 1e-5


def test_the_folder_is_complete(tmp_path, made):
    model, tokenizer = made("llama + SubLN")
    card = {
        "name": "Tiny",
        "base_model": "example/base",
        "recipe": {"stages": ["stage1", "stage2"]},
        "losses": {"code": {"teacher": 1.5, "ternary": 1.625}, "prose": {"ternary": 2.0}},
        "fingerprint": "abc123",
    }
    write_huggingface(model, tokenizer, tmp_path / "hf", card)
    text = "def f(x): return x"
    assert AutoTokenizer.from_pretrained(tmp_path / "hf").encode(text) == tokenizer.encode(text)
    assert json.loads((tmp_path / "hf/generation_config.json").read_text())["eos_token_id"] == 0
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert "bitray" not in config and config["dtype"] == "float32"
    assert config["quantization_config"]["linear_class"] == "autobitlinear"
    readme = (tmp_path / "hf/README.md").read_text()
    for part in ("# Tiny", "base_model: example/base", "abc123", "| code | 1.5000 | 1.6250 |"):
        assert part in readme


def test_a_card_with_an_unknown_field_is_refused():
    with pytest.raises(ValueError, match="lossess"):
        ModelCard(lossess={})


def test_a_wrong_byte_is_found(tmp_path, made):
    model, tokenizer = made("llama")
    write_huggingface(model, tokenizer, tmp_path / "hf")
    path = tmp_path / "hf/model.safetensors"
    good = load_file(path)
    for name in ("mlp.up_proj.weight", "mlp.up_proj.weight_scale"):
        bad = copy.deepcopy(good)
        tensor = bad[f"model.layers.1.{name}"]
        tensor.view(torch.uint8).view(-1)[0] ^= 1
        save_file(bad, path, metadata={"format": "pt"})
        with pytest.raises(ExportError, match=r"layers\.1\.mlp\.up_proj"):
            _check(model, tmp_path / "hf", "offline")


def test_a_new_export_replaces_an_old_one_but_nothing_else(tmp_path, made):
    model, tokenizer = made("llama")
    write_huggingface(model, tokenizer, tmp_path / "hf")
    (tmp_path / "hf/stale.txt").write_text("old")
    write_huggingface(model, tokenizer, tmp_path / "hf")
    assert not (tmp_path / "hf/stale.txt").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds no config"):
        write_huggingface(model, tokenizer, tmp_path / "mine")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["hf", "mine"]


def test_refusals(tmp_path):
    model, tokenizer = make_model("llama")
    with pytest.raises(UserError, match="choose one of offline, online"):
        write_huggingface(model, tokenizer, tmp_path / "hf", mode="offlin")
    set_strength(model, 0.25)
    with pytest.raises(UserError, match=r"strength is 0\.25"):
        write_huggingface(model, tokenizer, tmp_path / "hf")
    model.model.layers[0].mlp.up_proj.register_parameter(
        "stray", torch.nn.Parameter(torch.zeros(2))
    )
    set_strength(model, 1.0)
    with pytest.raises(UserError, match=r"no place for model\.layers\.0\.mlp\.up_proj\.stray"):
        write_huggingface(model, tokenizer, tmp_path / "hf")
    with pytest.raises(UserError, match="no ternary layer"):
        write_huggingface(build_model({"model_type": "llama", **FIELDS}), tokenizer, tmp_path / "x")
    assert not list(tmp_path.iterdir())

"""What cannot be exported is known before training, and said in a sentence."""

import pytest
from transformers import AutoConfig, PretrainedConfig

from bitray.export import GGUF_TYPES, can_export


def config(model_type: str = "llama", **changes) -> PretrainedConfig:
    fields = {
        "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
    }  # fmt: skip
    return AutoConfig.for_model(model_type, **{**fields, **changes})


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize(
    ("model_type", "subln"),
    [("llama", "none"), ("llama", "paper"), ("qwen2", "none"), ("qwen3", "none")],
)
def test_what_the_families_can_do(kind: str, model_type: str, subln: str):
    extra = {"head_dim": 64} if model_type == "qwen3" else {}
    assert can_export(config(model_type, **extra), kind, subln) is None


@pytest.mark.parametrize(
    ("model_type", "subln", "changes", "reason"),
    [
        ("qwen2", "paper", {}, "no architecture for qwen2 with SubLN"),
        ("qwen3", "paper", {"head_dim": 64}, "no architecture for qwen3 with SubLN"),
        ("llama", "all", {}, "SubLN before every projection"),
        ("llama", "paper", {"tie_word_embeddings": False}, "an output head of its own"),
        ("llama", "paper", {"attention_bias": True}, "'bitnet' cannot express biases"),
        ("llama", "none", {"hidden_act": "gelu"}, "activation 'gelu'"),
        ("qwen3", "none", {"head_dim": 64, "hidden_size": 320}, "hidden size cannot be padded"),
        ("llama", "paper", {"head_dim": 32}, "must be equal"),
        ("llama", "paper", {"intermediate_size": 500}, "grow by one ratio"),
        (
            "llama",
            "paper",
            {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}},
            "rotary scaling 'yarn'",
        ),
        ("qwen2", "none", {"use_sliding_window": True}, "sliding-window"),
    ],
)
def test_what_they_cannot(model_type: str, subln: str, changes: dict, reason: str):
    answer = can_export(config(model_type, **changes), "tq2_0", subln)
    assert answer is not None and reason in answer and "\n" not in answer


def test_an_unknown_type_or_family_is_an_answer_too():
    assert "nearest: 'i2_s'" in (can_export(config(), "i2s", "none") or "")
    assert "not supported" in (can_export(AutoConfig.for_model("gpt2"), "f16", "none") or "")


def test_a_converted_model_is_asked_without_naming_its_subln(made):
    assert can_export(made("llama + SubLN")[0], "i2_s") is None

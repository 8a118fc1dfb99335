"""Small random ternary models of every architecture and tokenizer, to prove exports with."""

import argparse
import inspect
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitray.export.tokenizer import SPLIT
from bitray.models import build_model, create_fake_moe, to_bitnet

_PRE = {
    "gpt-2": pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    ),
    "qwen2": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT % ""), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
    "llama-bpe": pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT % "{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    ),
}


def make_tokenizer(pre: str) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on a page of Python's own library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = _PRE[pre], decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|endoftext|>", "<|pad|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([inspect.getsource(argparse)], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|endoftext|>", pad_token="<|pad|>"
    )


_SMALL = {
    "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256,
    "tie_word_embeddings": True, "rms_norm_eps": 1e-5, "initializer_range": 0.15,
    "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 1,
}  # fmt: skip
_NARROW = {"hidden_size": 192, "num_attention_heads": 3, "num_key_value_heads": 1}
_LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 64,
}  # fmt: skip

MADE: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("gpt-2", "none", {"model_type": "llama"}),
    "llama, padded, untied": (
        "gpt-2", "none",
        {"model_type": "llama", **_NARROW, "intermediate_size": 500, "tie_word_embeddings": False},
    ),
    "llama 3 rotary, biases": (
        "llama-bpe", "none",
        {
            "model_type": "llama", "rope_parameters": _LLAMA3,
            "attention_bias": True, "mlp_bias": True,
        },
    ),
    "llama + SubLN": ("smollm", "paper", {"model_type": "llama"}),
    "llama + SubLN, padded": (
        "smollm",
        "paper",
        {"model_type": "llama", **_NARROW, "num_key_value_heads": 3, "intermediate_size": 384},
    ),
    "qwen2": ("qwen2", "none", {"model_type": "qwen2"}),
    "qwen2, padded": (
        "qwen2", "none",
        {
            "model_type": "qwen2", "hidden_size": 192, "num_attention_heads": 6,
            "intermediate_size": 300,
        },
    ),
    "qwen3": ("qwen2", "none", {"model_type": "qwen3", "head_dim": 128}),
}  # fmt: skip
WITH_EXPERTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama, copied experts": ("gpt-2", "none", {"model_type": "llama"}),
    "llama, identity router": ("gpt-2", "none", {"model_type": "llama"}),
    "llama, experts": ("gpt-2", "none", {"model_type": "llama", **_NARROW}),
    "qwen2, experts": ("qwen2", "none", {"model_type": "qwen2"}),
    "qwen3, experts": ("qwen2", "none", {"model_type": "qwen3", "head_dim": 128}),
}
"""Experts are copies where the name says so or nothing but copies will do."""


def make_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A small random model; random gains and biases, so that none of them can be lost unseen."""
    pre, subln, fields = {**MADE, **WITH_EXPERTS}[name]
    torch.manual_seed(0)
    model = to_bitnet(build_model({**_SMALL, **fields}), subln=subln).eval()
    if name in WITH_EXPERTS:
        router = "identity" if "identity" in name else "top_k"
        model = create_fake_moe(model, num_experts=4, top_k=2, router=router)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                center = 0.0 if parameter_name.endswith("bias") else 1.0
                parameter.copy_(center + 0.2 * torch.randn_like(parameter))
            elif "router" in parameter_name or (
                name.endswith(", experts") and "mlp" in parameter_name
            ):
                parameter.copy_(parameter.std() * torch.randn_like(parameter))
            elif "embed_tokens" in parameter_name:
                parameter.mul_(4.0)  # keeps the noise of int8 activations from being amplified
    return model, make_tokenizer(pre)

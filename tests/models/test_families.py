"""The zoo as data: every name in it exists in transformers and in GGUF."""

import gguf
import pytest
import torch
from tiny_models import make_model
from torch import nn
from transformers import GPT2Config

from bitray.models.convert import to_bitnet
from bitray.models.families import FAMILIES, decoder_layers, family_of, norm_eps
from bitray.settings import UserError

every_family = pytest.mark.parametrize("model_type", FAMILIES)


@every_family
def test_the_tables_name_every_parameter_once(model_type: str) -> None:
    family = FAMILIES[model_type]
    model = to_bitnet(make_model(model_type, tie_word_embeddings=False), subln="paper")
    known = {*family.model_tensors}
    for index in range(len(decoder_layers(model))):
        below = {**family.layer_tensors, **family.subln_tensors}
        known |= {f"{family.layers}.{index}.{name}" for name in below}
    assert {name.rpartition(".")[0] for name in model.state_dict()} == known


@every_family
def test_names_are_those_of_gguf(model_type: str) -> None:
    family = FAMILIES[model_type]
    of_arch = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}

    def tensors(architecture: str) -> set[str]:
        return {gguf.TENSOR_NAMES[t] for t in gguf.MODEL_TENSORS[of_arch[architecture]]}

    own = {f"blk.{{bid}}.{name}" for name in family.layer_tensors.values()}
    own |= {*family.model_tensors.values()}
    assert own <= tensors(family.gguf)
    if family.gguf_subln is not None:
        subln = {f"blk.{{bid}}.{name}" for name in family.subln_tensors.values()}
        assert subln <= tensors(family.gguf_subln)


@every_family
def test_a_family_is_found_from_model_and_config(model_type: str) -> None:
    model = make_model(model_type)
    assert family_of(model) is family_of(model.config) is FAMILIES[model_type]
    layers = decoder_layers(model)
    assert isinstance(layers, nn.ModuleList)
    assert len(layers) == 2
    assert norm_eps(model.config) == model.model.norm.variance_epsilon
    for name in FAMILIES[model_type].projections:
        assert type(layers[0].get_submodule(name)) is nn.Linear


def test_what_is_special_about_each() -> None:
    """The facts that exports depend on (design, EXPORT)."""
    assert {name: f.gguf_moe for name, f in FAMILIES.items()} == {
        "llama": "llama", "qwen2": "llama", "qwen3": "qwen3moe"
    }  # fmt: skip
    assert FAMILIES["llama"].gguf_subln == "bitnet"
    assert "self_attn.q_norm" in FAMILIES["qwen3"].layer_tensors
    assert "self_attn.q_norm" not in FAMILIES["qwen2"].layer_tensors


def test_a_misspelt_type_is_answered_with_the_nearest() -> None:
    config = GPT2Config()
    config.model_type = "lama"
    with pytest.raises(UserError, match=r"'lama' is not supported \(nearest: 'llama'\)"):
        family_of(config)


def test_dimensions_come_from_the_config() -> None:
    """Qwen3's heads * head_dim is not its hidden size; q/k/v of Qwen2 have biases."""
    attention = decoder_layers(to_bitnet(make_model("qwen3")))[0].self_attn
    assert attention.o_proj.subln.weight.shape == (4 * 32,)
    assert attention.q_proj.weight.shape == (4 * 32, 64)
    attention = decoder_layers(to_bitnet(make_model("qwen2")))[0].self_attn
    assert attention.q_proj.bias.shape == (64,)
    assert torch.is_tensor(attention.k_proj.bias) and attention.o_proj.bias is None

"""Conversion: what becomes ternary, what must not change, and how SubLN is calibrated."""

import pytest
import torch
from tiny_models import make_model
from torch import nn
from transformers import AutoModelForCausalLM, GPT2Config, Phi3Config

from bitray.models.batch import Batch
from bitray.models.convert import is_bitnet, least_squares_gain, to_bitnet
from bitray.models.families import FAMILIES, decoder_layers, family_of
from bitray.models.packed import last_hidden
from bitray.nn import BitLinear, SubLN, bit_linears, set_strength, strength_of
from bitray.settings import UserError

UP_DOWN = ("gate", "up", "down")
every_family = pytest.mark.parametrize("model_type", FAMILIES)


@every_family
def test_projections_become_ternary_and_nothing_else(model_type: str) -> None:
    model = make_model(model_type)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    assert to_bitnet(model) is model
    assert is_bitnet(model)
    assert len(bit_linears(model)) == 2 * 7
    assert type(model.lm_head) is nn.Linear
    after = dict(model.named_parameters())
    assert {name for name in after if "subln" not in name} == set(before)
    assert all(torch.equal(after[name], before[name]) for name in before)


@every_family
def test_strength_zero_without_subln_is_the_original_model(model_type: str, batch: Batch) -> None:
    """Biases, q/k norms, head dimensions: whatever conversion forgot would show here."""
    model = make_model(model_type)
    expected = last_hidden(model, batch)
    to_bitnet(model, subln="none")
    set_strength(model, 0.0)
    assert torch.equal(last_hidden(model, batch), expected)
    set_strength(model, 1.0)
    assert not torch.allclose(last_hidden(model, batch), expected, atol=1e-3)


@pytest.mark.parametrize(
    ("subln", "sites"),
    [
        ("none", set()),
        ("paper", {"self_attn.o_proj", "mlp.down_proj"}),
        ("all", {f"self_attn.{p}_proj" for p in "qkvo"} | {f"mlp.{p}_proj" for p in UP_DOWN}),
    ],
)
@every_family
def test_subln_sits_where_asked_with_the_widths_of_the_config(
    model_type: str, subln: str, sites: set[str]
) -> None:
    model = to_bitnet(make_model(model_type), subln=subln)  # type: ignore[arg-type]
    for layer in decoder_layers(model):
        found = {n: m for n, m in layer.named_modules() if isinstance(m, SubLN)}
        assert {name.removesuffix(".subln") for name in found} == sites
        for name, norm in found.items():
            linear = layer.get_submodule(name.removesuffix(".subln"))
            assert isinstance(linear, BitLinear)
            assert norm.weight.shape == (linear.in_features,)
            assert norm.eps == model.config.rms_norm_eps
    assert model.config.bitray == {"subln": subln}


def test_converting_twice_changes_nothing(batch: Batch) -> None:
    model = to_bitnet(make_model())
    modules, expected = list(model.modules()), last_hidden(model, batch)
    assert to_bitnet(model, subln="all", calibration=batch) is model
    assert list(model.modules()) == modules
    assert model.config.bitray == {"subln": "paper"}
    assert torch.equal(last_hidden(model, batch), expected)


def test_tied_embeddings_stay_tied() -> None:
    model = to_bitnet(make_model(tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_narrow_models_get_fp32_masters() -> None:
    model = to_bitnet(make_model().to(torch.bfloat16))
    assert {layer.weight.dtype for layer in bit_linears(model)} == {torch.float32}


@pytest.mark.parametrize("subln", ["paper", "all"])
def test_calibration_brings_strength_zero_close_to_the_original(batch: Batch, subln: str) -> None:
    original = last_hidden(make_model(), batch)[batch.real]

    def error(calibration: Batch | None) -> float:
        model = to_bitnet(make_model(), subln=subln, calibration=calibration)  # type: ignore[arg-type]
        set_strength(model, 0.0)
        return (last_hidden(model, batch)[batch.real] - original).norm() / original.norm()

    assert error(batch) < 0.25 * error(None)


def test_every_gain_fits_the_input_that_arrives_there(batch: Batch) -> None:
    """Sequentially: each is the least-squares fit *given* the gains before it."""
    model = to_bitnet(make_model(), calibration=batch)
    set_strength(model, 0.0)
    seen: dict[str, torch.Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, SubLN):
            module.register_forward_pre_hook(
                lambda _, args, name=name: seen.__setitem__(name, args[0][batch.real].double())
            )
    last_hidden(model, batch)
    assert len(seen) == 4
    for name, x in seen.items():
        n = x / (x.square().mean(-1, keepdim=True) + model.config.rms_norm_eps).sqrt()
        columns = zip(n.T.unsqueeze(-1), x.T.unsqueeze(-1), strict=True)
        expected = torch.stack([torch.linalg.lstsq(a, b).solution[0, 0] for a, b in columns])
        torch.testing.assert_close(
            model.get_submodule(name).weight.double(), expected, rtol=1e-4, atol=1e-6
        )


def test_calibration_leaves_mode_strength_and_padding_out(batch: Batch) -> None:
    model = make_model().train()
    to_bitnet(model, calibration=batch)
    assert model.training
    assert strength_of(model) == 1.0
    assert not any(p.grad is not None for p in model.parameters())
    batch.input_ids[~batch.real] = 1
    again = to_bitnet(make_model(), calibration=batch)
    for one, other in zip(model.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_silent_channel_gets_the_common_gain() -> None:
    x = torch.randn(2, 5, 4)
    x[..., 2] = 0
    gain = least_squares_gain(x, torch.ones(2, 5, dtype=torch.bool), 1e-6)
    assert gain.isfinite().all()
    assert gain.min() <= gain[2] <= gain.max()


# --------------------------------------------------------------------------------------- refusals


def test_an_unknown_architecture_is_refused_by_name() -> None:
    config = GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=64)
    with pytest.raises(UserError, match=r"gpt2.*h\.0\.attn\.c_attn.*llama, qwen2, qwen3"):
        to_bitnet(AutoModelForCausalLM.from_config(config))
    with pytest.raises(UserError, match="'gpt2' is not supported"):
        family_of(config)


def test_fused_projections_are_refused_by_name() -> None:
    config = Phi3Config(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        vocab_size=64,
        pad_token_id=0,
    )
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.qkv_proj"):
        to_bitnet(AutoModelForCausalLM.from_config(config))


def test_a_projection_that_is_missing_or_special_is_refused_by_name() -> None:
    class Packed(nn.Linear):
        pass

    model = make_model()
    model.model.layers[1].mlp.up_proj = Packed(64, 96)
    with pytest.raises(UserError, match=r"model\.layers\.1\.mlp\.up_proj: it is a Packed"):
        to_bitnet(model)
    model = make_model()
    del model.model.layers[0].self_attn.k_proj
    with pytest.raises(UserError, match=r"model\.layers\.0\.self_attn\.k_proj: it is missing"):
        to_bitnet(model)


@pytest.mark.usefixtures("unchecked")
def test_a_misspelt_choice_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"subln: 'papper'.*nearest: 'paper'"):
        to_bitnet(make_model(), subln="papper")  # type: ignore[arg-type]

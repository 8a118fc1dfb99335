"""GGUF files: unpacked, run by a NumPy engine of their own, and by llama.cpp if installed."""

from pathlib import Path

import gguf_models
import numpy as np
import pytest
import torch
from export_helpers import logits, relative, with_f16_tables
from gguf_engine import Engine
from gguf_models import MADE, WITH_EXPERTS, make_model, make_tokenizer

from bitray.export import GGUF_TYPES, ExportError, write_gguf, write_huggingface
from bitray.export.entries import entries
from bitray.export.packing import unpack
from bitray.export.plan import plan
from bitray.export.reader import read_gguf
from bitray.export.reference import dequantized
from bitray.export.verify import check_gguf
from bitray.models import build_model, create_fake_moe
from bitray.nn import BitLinear, set_strength
from bitray.settings import UserError


@pytest.mark.parametrize("name", MADE)
def test_i2_s_computes_what_the_model_does_padding_and_all(name, made, ids, tmp_path):
    model, tokenizer = made(name)
    report = write_gguf(model, tokenizer, tmp_path / "m.gguf", "i2_s")
    assert report.mismatches == 0 and report.ternary_tensors == 14
    assert ("padded" in name) == (report.padding is not None)
    expected = logits(with_f16_tables(dequantized(model)), ids)
    assert relative(Engine(report.path).logits(ids), expected) < 1e-5


@pytest.mark.parametrize("name", ["llama", "llama + SubLN", "qwen2", "qwen3"])
def test_f32_is_the_same_function(name, made, ids, tmp_path):
    model, tokenizer = made(name)
    report = write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    assert relative(Engine(report.path).logits(ids), logits(dequantized(model), ids)) < 1e-5


def test_bitnet_cpps_kernel_gives_the_logits_of_training(made, ids, tmp_path):
    model, tokenizer = made("llama + SubLN, padded")
    report = write_gguf(model, tokenizer, tmp_path / "m.gguf", "i2_s")
    expected = logits(with_f16_tables(make_model("llama + SubLN, padded")[0]), ids)
    # int8 rounding may fall the other way here and there, nothing else may differ
    assert relative(Engine(report.path, int8=True).logits(ids), expected) < 2e-2


@pytest.mark.parametrize("kind", GGUF_TYPES)
@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_every_type_holds_the_codes_and_scales_of_training(kind, name, made, tmp_path):
    """The codes come from the master here and now, and rows are unpermuted by hand."""
    model, tokenizer = made(name)
    write_gguf(model, tokenizer, tmp_path / "m.gguf", kind)
    file = read_gguf(tmp_path / "m.gguf")
    for index, layer in enumerate(model.model.layers):
        for module, tensor in (("q", "attn_q"), ("v", "attn_v"), ("o", "attn_output")):
            linear = getattr(layer.self_attn, f"{module}_proj")
            master = linear.weight.detach().double().numpy()
            scale = np.float32(np.abs(master).mean())
            codes = np.clip(np.rint(linear.weight.detach().numpy() / scale), -1, 1)
            if name == "llama" and module == "q":
                codes = codes.reshape(4, 2, 32, -1).swapaxes(1, 2).reshape(codes.shape)
            target = f"blk.{index}.{tensor}"
            record = file.tensors[f"{target}.weight"]
            found, scales = unpack(file.raw(f"{target}.weight"), record.shape, record.kind)
            assert np.array_equal(found, codes)
            if f"{target}.scale" in file.tensors:
                assert set(scales) == {1.0} and file.floats(f"{target}.scale")[0] == scale
            else:
                assert np.allclose(scales, scale, rtol=4e-3 if kind == "bf16" else 1e-3)


def test_tq_scales_lie_where_llama_cpp_applies_them(made, tmp_path):
    """llama.cpp ignores `.scale` in qwen2's MLP and applies it after the biases of llama's."""
    for name, expected in (("llama", True), ("qwen2", False), ("llama 3 rotary, biases", False)):
        write_gguf(*made(name), tmp_path / "m.gguf", "tq2_0")
        assert ("blk.0.attn_q.scale" in read_gguf(tmp_path / "m.gguf").tensors) == expected


def test_the_fields_that_engines_need(made, tmp_path):
    write_gguf(*made("llama + SubLN, padded"), tmp_path / "m.gguf", "i2_s")
    fields = read_gguf(tmp_path / "m.gguf").fields
    expected = {
        "general.architecture": "bitnet",
        "general.file_type": 40,
        "bitnet.block_count": 2,
        "bitnet.context_length": 256,
        "bitnet.embedding_length": 256,
        "bitnet.feed_forward_length": 512,
        "bitnet.attention.head_count": 4,
        "bitnet.attention.head_count_kv": 4,
        "bitnet.rope.dimension_count": 64,
        "bitnet.rope.freq_base": 10000.0,
        "bitnet.vocab_size": 512,
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.eos_token_id": 0,
        "tokenizer.ggml.add_bos_token": False,
    }
    assert {key: fields[key] for key in expected} == expected
    eps = fields["bitnet.attention.layer_norm_rms_epsilon"]
    assert eps == pytest.approx(1e-5 * 192 / 256, rel=1e-6)
    assert len(fields["tokenizer.ggml.tokens"]) == 512


def test_a_flipped_bit_is_found(made, tmp_path):
    model, tokenizer = made("llama")
    path = tmp_path / "m.gguf"
    write_gguf(model, tokenizer, path, "i2_s")
    planned = plan(model, "i2_s")
    tensors = entries(model, planned)
    check_gguf(path, tensors, planned)
    for entry in tensors:
        content = bytearray(path.read_bytes())
        file = read_gguf(path)
        start = len(content) - len(file.data) + file.tensors[entry.name].offset
        content[start] ^= 1
        (tmp_path / "bad.gguf").write_bytes(content)
        with pytest.raises(ExportError, match=entry.name):
            check_gguf(tmp_path / "bad.gguf", tensors, planned)


def test_a_failed_export_leaves_what_was_there(made, tmp_path, monkeypatch):
    path = tmp_path / "m.gguf"
    path.write_bytes(b"an older file")

    def fail(*_):
        raise ExportError("different")

    monkeypatch.setattr("bitray.export.gguf.check_gguf", fail)
    with pytest.raises(ExportError):
        write_gguf(*made("llama"), path, "i2_s")
    assert path.read_bytes() == b"an older file" and list(tmp_path.iterdir()) == [path]


def test_an_export_goes_to_object_storage(made, s3, tmp_path):
    from bitray import storage

    uri = storage.join(s3, "export", "m.gguf")
    report = write_gguf(*made("llama"), uri, "tq2_0")
    (tmp_path / "m.gguf").write_bytes(storage.read_bytes(uri))
    assert report.path == uri
    assert read_gguf(tmp_path / "m.gguf").fields["general.architecture"] == "llama"


def test_a_dense_model_is_written_in_floats_only(ids, tmp_path):
    torch.manual_seed(0)
    model = build_model(
        {
            "model_type": "llama", "vocab_size": 512, "hidden_size": 64, "intermediate_size": 96,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 64, "initializer_range": 0.1,
        }
    )  # fmt: skip
    report = write_gguf(model, make_tokenizer("gpt-2"), tmp_path / "m.gguf", "f32")
    assert report.ternary_tensors == 0
    assert relative(Engine(report.path).logits(ids), logits(model, ids)) < 1e-5
    model, tokenizer = make_model("llama")
    dense = dequantized(model)
    with pytest.raises(UserError, match="no ternary layer; convert it with to_bitnet"):
        write_gguf(dense, tokenizer, tmp_path / "x.gguf", "tq2_0")


def test_strength_below_one_is_refused(tmp_path):
    model, tokenizer = make_model("llama")
    set_strength(model, 0.5)
    with pytest.raises(UserError, match=r"strength is 0\.5"):
        write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.iterdir())


def test_a_parameter_without_a_place_is_refused(tmp_path):
    model, tokenizer = make_model("llama")
    layer = model.model.layers[0].mlp.up_proj
    assert isinstance(layer, BitLinear)
    layer.register_parameter("stray", torch.nn.Parameter(torch.zeros(2)))
    with pytest.raises(UserError, match=r"no tensor for model\.layers\.0\.mlp\.up_proj\.stray"):
        write_gguf(model, tokenizer, tmp_path / "m.gguf", "f32")


# -------------------------------------------------------------------------------------- llama.cpp


@pytest.mark.slow
@pytest.mark.parametrize("kind", [kind for kind in GGUF_TYPES if kind != "i2_s"])
@pytest.mark.parametrize("name", ["llama", "llama + SubLN, padded", "qwen2, padded", "qwen3"])
def test_llama_cpp_agrees(name, kind, made, tmp_path: Path):
    pytest.importorskip("llama_cpp")
    from verify_gguf import Subject, prove

    model, tokenizer = made(name)
    path = tmp_path / "m.gguf"
    write_gguf(model, tokenizer, path, kind)
    for row in prove(Subject(name, model, tokenizer), path, kind):
        assert not row.failed, row


@pytest.mark.parametrize("name", WITH_EXPERTS)
@pytest.mark.parametrize("kind", ["f32", "tq2_0"])
def test_experts_compute_what_the_model_does(kind, name, made, ids, tmp_path):
    """Three tensors a layer for all experts, each with its own scale; routers in fp32."""
    model, tokenizer = made(name)
    report = write_gguf(model, tokenizer, tmp_path / "m.gguf", kind)
    assert report.ternary_tensors == 2 * (4 + 3 * 4) and report.mismatches == 0
    expected = dequantized(model) if kind == "f32" else with_f16_tables(dequantized(model))
    engine = Engine(report.path)
    assert relative(engine.logits(ids), logits(expected, ids)) < 1e-5
    assert engine.key("expert_count") == 4 and engine.key("expert_used_count") == 2
    if kind == "tq2_0":
        scales = engine.file.floats("blk.1.ffn_up_exps.scale")
        of_training = [float(e.up_proj.quantized()[1]) for e in model.model.layers[1].mlp.experts]
        assert scales.tolist() == of_training and len(set(of_training)) in (1, 4)


def test_dense_experts_too(ids, tmp_path):
    model = create_fake_moe(build_model({**gguf_models._SMALL, "model_type": "llama"}), 3, 2)
    report = write_gguf(model, make_tokenizer("gpt-2"), tmp_path / "m.gguf", "f32")
    assert relative(Engine(report.path).logits(ids), logits(model, ids)) < 1e-5


def test_experts_that_have_no_form_are_refused_in_one_sentence(made, tmp_path):
    moe, tokenizer = made("llama, experts")
    with pytest.raises(UserError, match="i2_s holds one scale for a tensor"):
        write_gguf(moe, tokenizer, tmp_path / "m.gguf", "i2_s")
    subln = create_fake_moe(made("llama + SubLN")[0], 2, 1)
    with pytest.raises(UserError, match="a SubLN inside its experts"):
        write_gguf(subln, tokenizer, tmp_path / "m.gguf", "tq2_0")
    biased = create_fake_moe(made("llama 3 rotary, biases")[0], 2, 1)
    with pytest.raises(UserError, match="'llama' cannot express biases there"):
        write_gguf(biased, tokenizer, tmp_path / "m.gguf", "f32")
    with pytest.raises(UserError, match="no ternary class with these experts"):
        write_huggingface(moe, tokenizer, tmp_path / "hf")
    identity, _ = make_model("llama, identity router")
    with torch.no_grad():
        identity.model.layers[0].mlp.experts[1].up_proj.weight[0] += 1
    with pytest.raises(UserError, match="only while all experts are alike"):
        write_gguf(identity, tokenizer, tmp_path / "m.gguf", "f32")
    assert not list(tmp_path.iterdir())

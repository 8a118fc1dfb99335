"""Models in and out of folders: bit for bit, strictly, without pickles, with readable refusals."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitray import checkpoint
from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.families import FAMILIES
from bitray.models.loading import (
    build_model,
    load_model,
    load_teacher,
    load_tokenizer,
    model_files,
    save_model,
    skeleton,
)
from bitray.models.packed import last_hidden
from bitray.nn import bit_linears, set_strength, strength_of
from bitray.settings import UserError

every_family = pytest.mark.parametrize("model_type", FAMILIES)
both_ties = pytest.mark.parametrize("tied", [True, False])


def assert_same(loaded: PreTrainedModel, original: PreTrainedModel, batch: Batch) -> None:
    """Weights bit-equal under the same names, ties as before, the same outputs."""
    one, other = loaded.state_dict(), original.state_dict()
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert len(list(loaded.parameters())) == len(list(original.parameters()))
    assert torch.equal(last_hidden(loaded, batch), last_hidden(original, batch))


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerBase:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE({"a": 0, "b": 1, "ab": 2, "<eos>": 3}, [("a", "b")]))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")


@every_family
@both_ties
def test_a_hugging_face_folder_loads(
    model_type: str, tied: bool, batch: Batch, tmp_path: Path
) -> None:
    model = make_model(model_type, tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    assert_same(load_model(str(tmp_path)), model, batch)


@every_family
@both_ties
@pytest.mark.parametrize("subln", ["paper", "none", None])
def test_what_is_saved_loads_bit_for_bit(
    model_type: str, tied: bool, subln: str | None, batch: Batch, tmp_path: Path
) -> None:
    model = make_model(model_type, tie_word_embeddings=tied)
    if subln is not None:
        to_bitnet(model, subln=subln, calibration=batch)  # type: ignore[arg-type]
    save_model(model, str(tmp_path))
    assert_same(load_model(str(tmp_path)), model, batch)


@both_ties
@pytest.mark.parametrize("ternary", [True, False])
def test_a_checkpoint_of_training_loads(
    tied: bool, ternary: bool, batch: Batch, tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = make_model(tie_word_embeddings=tied)
    if ternary:
        to_bitnet(model, calibration=batch)
    directory = str(tmp_path / "step_000010")
    tensors = {"model": model.state_dict(), "optimizer": {"step": torch.zeros(())}}
    checkpoint.save(directory, tensors, {"step": 10}, model_files(model, tokenizer))
    assert_same(load_model(directory), model, batch)
    assert load_tokenizer(directory).tokenize("ab") == ["ab"]


def test_object_storage_holds_models_too(
    batch: Batch, s3: str, tokenizer: PreTrainedTokenizerBase
) -> None:
    model = to_bitnet(make_model())
    save_model(model, f"{s3}/model", tokenizer)
    assert_same(load_model(f"{s3}/model"), model, batch)
    assert load_tokenizer(f"{s3}/model").tokenize("ab") == ["ab"]


def test_the_skeleton_has_the_tree_and_dimensions(tmp_path: Path) -> None:
    model = to_bitnet(make_model("qwen3"), subln="all")
    save_model(model, str(tmp_path))
    tree = skeleton(tmp_path)
    shapes = {name: tensor.shape for name, tensor in tree.state_dict().items()}
    assert shapes == {name: tensor.shape for name, tensor in model.state_dict().items()}
    assert [type(m) for m in tree.modules()] == [type(m) for m in model.modules()]


def test_a_loaded_ternary_model_is_at_full_strength_with_fp32_masters(
    batch: Batch, tmp_path: Path
) -> None:
    model = to_bitnet(make_model())
    set_strength(model, 0.3)
    save_model(model, str(tmp_path))
    loaded = load_model(str(tmp_path), dtype=torch.bfloat16)
    assert strength_of(loaded) == 1.0
    assert loaded.model.embed_tokens.weight.dtype == torch.bfloat16
    for one, other in zip(bit_linears(loaded), bit_linears(model), strict=True):
        for got, expected in zip(one.quantized(), other.quantized(), strict=True):
            assert torch.equal(got, expected)
    assert last_hidden(loaded, batch).isfinite().all()


@pytest.mark.parametrize("ternary", [True, False])
def test_a_teacher_is_frozen_and_does_not_learn(ternary: bool, tmp_path: Path) -> None:
    model = make_model()
    save_model(to_bitnet(model) if ternary else model, str(tmp_path))
    teacher = load_teacher(str(tmp_path), torch.bfloat16, "cpu")
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.training
    assert teacher.lm_head.weight.dtype == torch.bfloat16


def test_tokenizers_come_back(tokenizer: PreTrainedTokenizerBase, tmp_path: Path) -> None:
    save_model(make_model(), str(tmp_path), tokenizer)
    assert load_tokenizer(str(tmp_path)).get_vocab() == tokenizer.get_vocab()


# ----------------------------------------------------------------------------------- new models

SMALL = {
    "model_type": "llama", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
    "num_attention_heads": 2, "vocab_size": 64,
}  # fmt: skip


def test_a_new_model_is_fp32_and_follows_the_seed() -> None:
    config = {**SMALL, "rope_theta": 5e5}
    torch.manual_seed(0)
    one = build_model(config)
    torch.manual_seed(0)
    other = build_model(config)
    assert {p.dtype for p in one.parameters()} == {torch.float32}
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert one.config.rope_parameters["rope_theta"] == 5e5


@pytest.mark.parametrize(
    ("config", "says"),
    [
        ({"hidden_size": 32}, "'model_type' has to be given"),
        ({"model_type": "llamma"}, "no model_type 'llamma'"),
        ({"model_type": "gpt2"}, "'gpt2' is not supported"),
        (
            {"model_type": "llama", "hiden_size": 32},
            r"'hiden_size' is no field of llama \(nearest: 'hidden_size'\)",
        ),
        ({"model_type": "llama", "hidden_size": "abc"}, r"'hidden_size' expected int, got str"),
        ({"model_type": "llama", "hidden_size": 250}, r"\(250\) is not a multiple of the number"),
        ({"model_type": "llama", "num_attention_heads": 3}, r"of attention heads \(3\)"),
        ({"model_type": "llama", "hidden_act": "nope"}, r"no llama can be made of it: 'nope'"),
    ],
)
def test_a_wrong_config_is_refused(config: dict[str, object], says: str) -> None:
    with pytest.raises(UserError, match=says):
        build_model(config)


# --------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    "text", ["{", '{"model_type": "llama", "hidden_size": "abc"}', "\xff", "[]"]
)
def test_a_config_that_cannot_be_read_is_refused(tmp_path: Path, text: str) -> None:
    """In a folder that has weights."""
    build_model(SMALL).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match=str(tmp_path)):
        load_model(str(tmp_path))


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(to_bitnet(make_model()), str(tmp_path / "saved"))
    return tmp_path / "saved"


def _edit(folder: Path, change: Callable[[dict[str, torch.Tensor]], object]) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)


NORM = "model.layers.1.mlp.down_proj.subln.weight"


def test_a_missing_weight_is_named(saved: Path) -> None:
    _edit(saved, lambda tensors: tensors.pop(NORM))
    with pytest.raises(UserError, match=f"missing weights: {NORM}"):
        load_model(str(saved))


def test_an_unexpected_weight_is_named(saved: Path) -> None:
    _edit(saved, lambda tensors: tensors.update(stranger=torch.zeros(1)))
    with pytest.raises(UserError, match="unexpected weights: stranger"):
        load_model(str(saved))


def test_a_weight_of_another_shape_is_named(saved: Path) -> None:
    _edit(saved, lambda tensors: tensors.update({NORM: torch.zeros(5)}))
    with pytest.raises(UserError, match=rf"{NORM} has shape \(5,\), the config says \(96,\)"):
        load_model(str(saved))


def test_a_hugging_face_folder_is_strict_too(tmp_path: Path) -> None:
    """transformers by itself would leave such a projection random, with a warning."""
    make_model().save_pretrained(tmp_path)
    missing = "model.layers.0.self_attn.q_proj.weight"
    _edit(tmp_path, lambda tensors: tensors.pop(missing))
    with pytest.raises(UserError, match=f"missing weights: {missing}"):
        load_model(str(tmp_path))


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    model = make_model()
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"pickled \(pytorch_model\.bin\)"):
        load_model(str(tmp_path))


def test_code_of_a_repository_does_not_run(saved: Path) -> None:
    config = json.loads((saved / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}
    (saved / "config.json").write_text(json.dumps(config))
    (saved / "mine.py").write_text("raise SystemExit('ran')")
    with pytest.raises(UserError, match="saved"):
        load_model(str(saved))


def test_a_torn_file_is_refused(tmp_path: Path) -> None:
    for folder, model in (("dense", make_model()), ("ternary", to_bitnet(make_model()))):
        save_model(model, str(tmp_path / folder))
        file = tmp_path / folder / "model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        with pytest.raises(UserError, match=f"{folder}.*cannot be"):
            load_model(str(tmp_path / folder))


def test_an_unknown_path_is_one_sentence(saved: Path) -> None:
    with pytest.raises(UserError, match=r"savd: no such model folder \(nearest: 'saved'\)$"):
        load_model(str(saved.parent / "savd"))
    with pytest.raises(UserError, match=r"no config\.json, so this is not a model"):
        load_model(str(saved.parent))


def test_an_unfinished_checkpoint_says_so(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "step_000001").mkdir()
    saved.rename(tmp_path / "step_000001" / "model")
    with pytest.raises(UserError, match="an unfinished checkpoint"):
        load_model(str(tmp_path / "step_000001"))


def test_a_hub_id_that_cannot_be_had_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"someone/nothing: no such folder, and not loaded") as e:
        load_model("someone/nothing")
    assert "\n" not in str(e.value)

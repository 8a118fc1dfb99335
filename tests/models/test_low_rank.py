"""Low-rank corrections of whole models: their starts against NumPy, and what they recover."""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model, load_model, save_model
from bitray.models.losses import LossModel, Term, capturing
from bitray.models.low_rank import (
    add_corrections,
    closed_form,
    corrected_layers,
    init_corrections,
    reduced_rank_regression,
    svd_start,
    train_corrections_only,
)
from bitray.models.packed import last_hidden
from bitray.nn import LowRank
from bitray.objectives import ContinuePretrain
from bitray.settings import UserError

CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip


def rows(seed: int, count: int = 16) -> Batch:
    """Each token follows from the one before it and a step that the row keeps."""
    draw = np.random.default_rng(seed)
    ids = np.zeros((count, 32), np.int32)
    ids[:, 0], step = draw.integers(0, 61, count), draw.integers(1, 7, count)
    for i in range(1, 32):
        ids[:, i] = (ids[:, i - 1] + step + ids[:, i - 1] % 3) % 61
    return Batch.from_rows(ids, [[20, 10]] * count, [0] * count)


def loss_of(model: PreTrainedModel, batch: Batch) -> Tensor:
    ce = ContinuePretrain()
    term = Term("ce", ce, 1 / int(ce.count(batch)))
    return LossModel(model)(batch, [term])[0]


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    """A model that has learnt its rows."""
    torch.manual_seed(0)
    model = build_model(CONFIG)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.1)
    for seed in range(150):
        loss_of(model, rows(seed)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def rounded(dense: PreTrainedModel, rank: float | int = 0.25) -> PreTrainedModel:
    model = to_bitnet(copy.deepcopy(dense), "none")
    add_corrections(model, rank)
    return model


def held_out(model: PreTrainedModel) -> float:
    with torch.no_grad():
        return float(loss_of(model, rows(10_000, 64)))


def test_svd_is_the_best_approximation_of_its_rank(dense: PreTrainedModel) -> None:
    """Eckart and Young: what is left are the singular values that were cut off."""
    model, weights = rounded(dense), dense.state_dict()
    svd_start(model, weights)
    for name, layer in corrected_layers(model).items():
        codes, scale = layer.quantized()
        error = (weights[f"{name}.weight"] - codes * scale).double().numpy()
        u, v = (p.detach().double().numpy() for p in (layer.correction.u, layer.correction.v))
        values = np.linalg.svd(error, compute_uv=False)
        left = np.linalg.norm(error - u @ v.T)
        assert u.shape[1] == min(error.shape) // 4
        assert left == pytest.approx(np.sqrt((values[u.shape[1] :] ** 2).sum()), rel=1e-5)
        np.testing.assert_allclose(np.linalg.norm(u, axis=0), np.linalg.norm(v, axis=0), rtol=1e-4)


@pytest.mark.parametrize("init", ["svd", "closed_form"])
def test_a_rounded_model_gets_most_of_its_loss_back(dense: PreTrainedModel, init: str) -> None:
    model = rounded(dense)
    before = held_out(model)
    assert before > held_out(dense) + 1
    notice = init_corrections(
        model, LowRank(init=init), dense.state_dict(), rows(1), lambda: held_out(model)
    )
    assert notice is None
    assert held_out(model) - held_out(dense) < 0.25 * (before - held_out(dense))


def test_a_start_that_raises_the_loss_is_dropped(dense: PreTrainedModel) -> None:
    """As on a model that has been trained since; here the original weights are someone else's."""
    model = rounded(dense)
    before, codes = held_out(model), [x.quantized()[0] for x in corrected_layers(model).values()]
    strange = {k: torch.randn_like(v) for k, v in dense.state_dict().items()}
    notice = init_corrections(model, LowRank(init="svd"), strange, rows(1), lambda: held_out(model))
    assert notice is not None and "svd raises the loss on the calibration batch from" in notice
    assert held_out(model) == before
    for layer, kept in zip(corrected_layers(model).values(), codes, strict=True):
        assert torch.equal(layer.quantized()[0], kept)
        assert not layer.correction.u.any() and layer.correction.v.any()


def test_the_closed_form_reconstructs_outputs_better_than_the_svd(dense: PreTrainedModel) -> None:
    """Layer by layer on the calibration set: `|W x - Q(W) Qa(x) - U V^T x|^2`."""
    batch, weights, errors = rows(1, 64), dense.state_dict(), {}
    for kind in ("svd", "closed_form", "none"):
        model = rounded(dense)
        if kind == "svd":
            svd_start(model, weights)
        if kind == "closed_form":
            closed_form(model, weights, batch)
        for name, layer in corrected_layers(model).items():
            inputs: list[Tensor] = []
            handle = layer.register_forward_pre_hook(lambda _, args, to=inputs: to.append(args[0]))
            with torch.no_grad(), capturing([layer]) as outputs:
                last_hidden(model, batch)
            handle.remove()
            wanted = (inputs[0] @ weights[f"{name}.weight"].T)[batch.real]
            error = (wanted - outputs[0][batch.real]).square().sum() / wanted.square().sum()
            errors[kind, name] = error.item()
    names = list(corrected_layers(rounded(dense)))
    for name in names:
        assert errors["closed_form", name] < errors["svd", name] < errors["none", name], name


def test_reduced_rank_regression_has_no_better_solution() -> None:
    """Against NumPy: the ordinary solution's outputs, projected on their leading directions."""
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(200, 12)) @ draw.normal(size=(12, 12)), draw.normal(size=(200, 9))
    y += x @ draw.normal(size=(12, 9))
    u, v = (p.numpy() for p in reduced_rank_regression(torch.tensor(x), torch.tensor(y), 3))
    fit = x @ np.linalg.lstsq(x, y, rcond=None)[0]
    best = fit @ (basis := np.linalg.svd(fit, full_matrices=False)[2][:3].T) @ basis.T
    error = np.linalg.norm(y - x @ v @ u.T)
    assert error == pytest.approx(np.linalg.norm(y - best), rel=1e-2)  # it is damped


def test_only_the_corrections_are_trained(dense: PreTrainedModel) -> None:
    model = rounded(dense, rank=4)
    train_corrections_only(model)
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, _ in model.named_parameters() if ".correction." in n}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0
    )
    loss_of(model, rows(0)).backward()
    optimizer.step()
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {name for name in trained if name.endswith(".u")}  # V moves once U is not zero


def test_saved_and_reloaded_strictly(dense: PreTrainedModel, tmp_path: Path) -> None:
    model = rounded(dense)
    svd_start(model, dense.state_dict())
    save_model(model, str(tmp_path / "a"))
    again = load_model(str(tmp_path / "a"))
    assert held_out(again) == held_out(model)
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    held = load_model(str(tmp_path / "a"), dtype=torch.bfloat16)
    assert all(x.correction.u.dtype == torch.float32 for x in corrected_layers(held).values())
    assert held_out(held) == pytest.approx(held_out(model), abs=0.05)
    plain = to_bitnet(copy.deepcopy(dense), "none")
    save_model(plain, str(tmp_path / "b"))
    (tmp_path / "b" / "model.safetensors").rename(tmp_path / "a" / "model.safetensors")
    with pytest.raises(UserError, match=r"missing weights: .*correction\.u"):
        load_model(str(tmp_path / "a"))


def test_a_rank_larger_than_a_layer_is_refused(dense: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="33 is larger than the smaller side of a layer of 64"):
        rounded(dense, rank=33)

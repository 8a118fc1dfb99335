"""What must hold of every optimizer. A new one is picked up from the `Optimizer` union."""

import copy
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import ranks
import shared_net
import torch
from pydantic import ValidationError
from torch import Tensor, nn

from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.models.losses import LossModel, Term
from bitray.objectives import ContinuePretrain
from bitray.optim import AdamW, Optimizer, clip_grad_norm, set_learning_rates
from bitray.settings import Settings
from bitray.training import state
from bitray.training.parallel import parallelize, world
from bitray.training.settings import Resume, TrainingSettings
from bitray.training.state import Position


def _members(union: Any) -> list[Any]:
    """Settings classes of a union, under whatever annotations it carries."""
    inner = [kind for part in get_args(union) for kind in _members(part)]
    return inner or ([union] if hasattr(union, "build") else [])


EVERY = {kind.model_fields["type"].default: kind for kind in _members(Optimizer)}


class Holder(Settings):
    """A node of settings as training has it."""

    optimizer: Optimizer = AdamW()


@pytest.fixture(params=sorted(EVERY))
def settings(request: pytest.FixtureRequest) -> Any:
    return _settings(request.param)


def _settings(name: str) -> Any:
    kind = EVERY[name]
    return kind(**{name: 1e-2 for name in ("lr", "adamw_lr") if name in kind.model_fields})


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> list[float]:
    losses = []
    for step in steps:
        losses.append(shared_net.backward(model, step).item())
        clip_grad_norm(model.parameters(), 1.0)
        set_learning_rates(optimizer, 1 / (1 + step))
        optimizer.step()
        optimizer.zero_grad()
    return losses


def test_lowers_a_loss(settings):
    model = shared_net.model()
    optimizer = settings.build(model)
    losses = []
    for _ in range(60):
        losses.append(shared_net.backward(model, step=0))
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.7 * losses[0]


def test_groups_have_a_name_and_a_peak_and_hold_every_parameter_once(settings):
    model = shared_net.model()
    optimizer = settings.build(model)
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names)
    assert all(group["lr"] == group["peak_lr"] > 0 for group in optimizer.param_groups)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())


def test_groups_may_have_rates_of_their_own(settings):
    given = type(settings)(**settings.model_dump() | {"group_lr": {"no_decay": 0.5}})
    model = shared_net.model()
    peaks = {g["name"]: (g["lr"], g["peak_lr"]) for g in given.build(model).param_groups}
    assert peaks.pop("no_decay") == (0.5, 0.5)
    assert set(peaks.values()) == {(1e-2, 1e-2)}
    assert {*peaks, "no_decay"} <= set(given.group_names())
    for field, value in (("group_lr", 1.0), ("group_schedule", {})):
        with pytest.raises(ValidationError, match=rf"{field}.no_decoy.*nearest: 'no_decay'"):
            type(settings)(**{field: {"no_decoy": value}})


def test_it_knows_the_bytes_of_its_state(settings):
    """Counters of steps and norms of single matrices are not worth counting."""
    torch.manual_seed(0)
    model = LossModel(to_bitnet(build_model(CONFIG | {"vocab_size": 331}))).train()
    optimizer = settings.build(model)
    _on_rows(model, optimizer, range(1))
    held = sum(
        value.numel() * value.element_size()
        for state in optimizer.state.values()
        for value in state.values()
        if value.ndim
    )
    held += sum(t.numel() * 4 for ts in getattr(optimizer, "largest", {}).values() for t in ts)
    assert settings.state_bytes(model) == pytest.approx(held, rel=0.01)


def test_state_round_trips_bit_for_bit(settings):
    model = shared_net.model()
    optimizer = settings.build(model)
    _train(model, optimizer, range(5))
    resumed = copy.deepcopy(model)
    again = settings.build(resumed)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    _train(model, optimizer, range(5, 10))
    _train(resumed, again, range(5, 10))
    for expected, got in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(expected, got)


def test_repeats_bit_for_bit(settings):
    results = []
    for _ in range(2):
        model = shared_net.model()
        _train(model, settings.build(model), range(5))
        results.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*results)


def _ten_steps(settings: Any) -> dict[str, Tensor]:
    model = shared_net.shard(shared_net.model())
    _train(model, settings.build(model), range(10))
    return {name: shared_net.whole(p) for name, p in model.named_parameters()}


CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
HEAD = Term("continue_pretrain", ContinuePretrain(), 0.01)


def _language_model(settings: Any, seed: int) -> tuple[LossModel, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = LossModel(to_bitnet(build_model(CONFIG))).train()
    model = parallelize(model, TrainingSettings(max_steps=1), torch.device("cpu"))
    return model, settings.build(model)


def _on_rows(model: LossModel, optimizer: torch.optim.Optimizer, steps: range) -> dict[str, Tensor]:
    """Weights after steps on the same rows on every worker."""
    for step in steps:
        ids = np.random.default_rng(step).integers(0, 61, (2, 12)).astype(np.int32)
        batch = Batch.from_rows(ids, [[12]] * 2, [0, 0])
        (model(batch, [HEAD])[0] / world()[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: shared_net.whole(p) for name, p in model.named_parameters()}


def _saved_and_resumed(settings: Any, folder: Path) -> dict[str, dict[str, Tensor]]:
    """Weights after six steps: at one go, and resumed after three by other weights and moments."""
    model, optimizer = _language_model(settings, 0)
    _on_rows(model, optimizer, range(3))
    directory = f"{folder}/of_{world()[1]}"
    state.save(directory, model, optimizer, state.as_json(Position(step=3), None), {})
    found = {"whole": _on_rows(model, optimizer, range(3, 6))}
    model, optimizer = _language_model(settings, 1)
    state.resume(directory, model, optimizer, Resume())
    return found | {"resumed": _on_rows(model, optimizer, range(3, 6))}


def _for_checkpoints(settings: Any) -> Any:
    """Small rates, since rounding is discontinuous; codes in `adamw_8bit`, clips at every step."""
    special = {"adamw_8bit": {"min_8bit_size": 256}, "muonclip": {"tau": 1e-3}}
    changes = special.get(settings.type, {}) | {"lr": 1e-4}
    return type(settings)(**settings.model_dump() | changes)


def _everything(folder: Path) -> dict[str, dict[str, Any]]:
    """Ten steps, and six with a checkpoint, of every optimizer; alike on one worker and on two."""
    return {
        name: {
            "ten": _ten_steps(_settings(name)),
            **_saved_and_resumed(_for_checkpoints(_settings(name)), folder / name),
        }
        for name in EVERY
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("optimizers")


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, dict[str, Any]]]:
    return ranks.run(_everything, folder, folder)


@pytest.fixture(scope="module")
def one(folder: Path) -> dict[str, dict[str, Any]]:
    return _everything(folder)


def test_two_fsdp_workers_agree_with_one(settings, one, two):
    tolerance = 1e-6 if settings.type == "adamw" else 1e-3
    for worker in two:
        expected = one[settings.type]["ten"]
        torch.testing.assert_close(
            worker[settings.type]["ten"], expected, rtol=tolerance, atol=tolerance
        )


def test_checkpoints_resume_bit_for_bit(settings, one, two):
    for found in (*two, one):
        for name, value in found[settings.type]["whole"].items():
            assert torch.equal(found[settings.type]["resumed"][name], value), name


def test_one_worker_takes_over_from_two(settings, one, two, folder: Path):
    """The blocks of `adamw_8bit` are others there, so its codes are, too."""
    assert two
    model, optimizer = _language_model(_for_checkpoints(settings), 1)
    state.resume(f"{folder}/{settings.type}/of_2", model, optimizer, Resume())
    begin = dict(_language_model(settings, 0)[0].named_parameters())
    expected = one[settings.type]["whole"]
    for name, value in _on_rows(model, optimizer, range(3, 6)).items():
        way = (expected[name] - begin[name]).norm()
        assert (value - expected[name]).norm() <= 0.02 * way, name


def test_the_type_is_a_name_that_exists():
    assert Holder.model_validate({"optimizer": {"lr": 0.1}}).optimizer.type == "adamw"
    for name in EVERY:
        assert Holder.model_validate({"optimizer": {"type": name}}).optimizer.type == name
    with pytest.raises(ValidationError):
        Holder.model_validate({"optimizer": {"type": "sgd"}})


@pytest.mark.parametrize("lr", [0.0, -1.0, float("nan")])
def test_impossible_rates_are_refused(settings, lr):
    with pytest.raises(ValidationError):
        type(settings)(lr=lr)

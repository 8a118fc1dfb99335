"""The stage that trains low-rank corrections alone, on one worker and on two."""

from pathlib import Path
from typing import Any

import numpy as np
import ranks
import torch
from keep import Keep
from test_parallel import CONFIG, CPU, tickets, whole

from bitray.data.tickets import Deal
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.models.losses import LossModel
from bitray.models.low_rank import add_corrections, train_corrections_only
from bitray.training import state
from bitray.training.gradients import watched_parameters
from bitray.training.loop import Every, Loop, autocast_for
from bitray.training.parallel import parallelize, world
from bitray.training.settings import Resume, TrainingSettings
from bitray.training.teacher import InProcessTeacher

SETTINGS = TrainingSettings.model_validate({
    "max_steps": 8, "batch_size": 4, "gradient_accumulation_steps": 3, "max_seq_length": 24,
    "log_every": 1, "optimizer": {"type": "adamw", "lr": 1e-3}, "lambda_warmup": {"enabled": False},
    "lrc": {"rank": 4}, "activation_checkpointing": True,
    "objectives": {
        "continue_pretrain": {"weight": 0.0}, "hidden_distill": {"weight": 1.0, "loss_type": "mse"},
        "attention_distill": {"weight": 0.1, "gamma": 1.0},
    },
})  # fmt: skip


def made() -> tuple[Loop, Keep]:
    torch.manual_seed(0)
    dense = build_model(CONFIG | {"initializer_range": 0.2})
    student = build_model(CONFIG)
    student.load_state_dict(dense.state_dict())
    to_bitnet(student, "none")
    add_corrections(student, 4)
    train_corrections_only(student)
    model = parallelize(LossModel(student), SETTINGS, CPU)
    teacher = InProcessTeacher(dense.requires_grad_(False), autocast_for(CPU, "auto"))
    kept, optimizer = Keep(), SETTINGS.optimizer.build(model)
    parts = (SETTINGS, CPU, autocast_for(CPU, "auto"), teacher)
    return Loop("lrc", model, optimizer, *parts, sinks=[kept]), kept


def trained(folder: Path) -> dict[str, Any]:
    """All steps at once, and again from a checkpoint in the middle."""
    run, kept = made()
    directory = str(folder / f"at_3_of_{world()[1]}")

    def save(loop: Loop) -> None:
        if loop.position.step == 3:
            held = state.as_json(loop.position, {"step": 3})
            state.save(directory, loop.model, loop.optimizer, held, {})

    run.hooks = [Every(1, save)]
    deal = Deal(SETTINGS.gradient_accumulation_steps, world()[1])
    run.run(tickets(deal, SETTINGS.batch_size))
    rest, again = made()
    rest.position, _ = state.resume(directory, rest.model, rest.optimizer, Resume())
    rest.data_step = 3
    rest.run(tickets(deal, SETTINGS.batch_size, 3))
    return {
        "losses": kept.values,
        "rest": again.values,
        "weights": {name: whole(p) for name, p in run.model.model.named_parameters()},
    }


def test_two_workers_train_the_corrections_as_one_does(tmp_path: Path) -> None:
    """Frozen and trained weights in one FSDP unit, checkpointed activations, resumed half-way."""
    (two, _), one = ranks.run(trained, tmp_path, tmp_path), trained(tmp_path)
    for found in (one, two):
        assert found["rest"] == found["losses"][3:]
        # every step has other rows, so single losses say little
        assert np.mean(found["losses"][-3:]) < 0.97 * np.mean(found["losses"][:3])
    np.testing.assert_allclose(two["losses"], one["losses"], rtol=1e-5)
    before = dict(made()[0].model.model.named_parameters())
    for name, value in one["weights"].items():
        moved = not torch.equal(value, before[name].detach())
        assert moved == (".correction." in name), name
        torch.testing.assert_close(two["weights"][name], value, rtol=1e-3, atol=1e-4)


def test_influence_looks_at_what_is_trained() -> None:
    run, _ = made()
    (layer,) = watched_parameters(run.model, depth=0.5)
    names = {id(p): name for name, p in run.model.model.named_parameters()}
    assert len(layer) == 14 and all(".correction." in names[id(p)] for p in layer)

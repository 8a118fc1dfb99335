"""The loop on one GPU: bf16 under autocast, compiled, laid over a mesh of one, every optimizer."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from keep import Keep
from torch.distributed.device_mesh import init_device_mesh

from bitray import checkpoint
from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.families import decoder_layers
from bitray.models.isolation import check_documents_isolated
from bitray.models.loading import build_model
from bitray.nn import bit_linears
from bitray.training import state
from bitray.training.loop import Every, Loop, autocast_for
from bitray.training.parallel import _shard, parallelize, with_losses
from bitray.training.settings import Resume, TrainingSettings
from bitray.training.teacher import InProcessTeacher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.usefixtures("unchecked"),
]
CONFIG = {
    "model_type": "llama", "vocab_size": 256, "hidden_size": 128, "intermediate_size": 256,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
WIDTH = 128
GPU = torch.device("cuda", 0)
DISTILLED = {
    "continue_pretrain": {"weight": 0.5}, "logits_distill": {"weight": 0.5},
    "hidden_distill": {"weight": 1.0}, "attention_distill": {"weight": 1.0},
}  # fmt: skip


@pytest.fixture
def group(tmp_path: Path) -> Iterator[None]:
    dist.init_process_group(
        "cpu:gloo,cuda:nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


def settings(**changes: Any) -> TrainingSettings:
    values = {
        "max_steps": 12, "batch_size": 4, "gradient_accumulation_steps": 2,
        "max_seq_length": WIDTH, "log_every": 1, "optimizer": {"type": "adamw", "lr": 1e-3},
        "lambda_warmup": {"warmup_steps": 4},
    } | changes  # fmt: skip
    return TrainingSettings.model_validate(values)


def tickets() -> Iterator[tuple[int, Batch]]:
    for ticket in range(1000):
        first = np.random.default_rng(ticket).integers(0, 256, (4, 1))
        ids = (first + 7 * np.arange(WIDTH)) % 256  # something that can be learnt
        yield ticket, Batch.from_rows(ids, [[50, 60]] * 4, [0] * 4)


def loop(given: TrainingSettings, sharded: bool = False) -> tuple[Loop, Keep]:
    torch.manual_seed(0)
    student = to_bitnet(build_model(CONFIG), "paper").to(GPU)
    model = with_losses(student, given, GPU)
    check_documents_isolated(student, GPU)
    parallelize(model, given, GPU)
    if sharded:
        _shard(model, decoder_layers(model.model), init_device_mesh("cuda", (1,)))
    kept, autocast, teacher = Keep(), autocast_for(GPU, "auto"), None
    if given.needs_teacher:
        torch.manual_seed(1)
        dense = build_model(CONFIG | {"initializer_range": 0.2}).requires_grad_(False).to(GPU)
        teacher = InProcessTeacher(dense, autocast)
    optimizer = given.optimizer.build(model)
    made = Loop("here", model, optimizer, given, GPU, autocast, teacher=teacher, sinks=[kept])
    return made, kept


@pytest.mark.parametrize("kind", [
    "adamw", "adamw_8bit", "muon", "muonclip", "apollo", "apollo_mini",
])  # fmt: skip
def test_every_optimizer_learns(kind: str) -> None:
    if kind == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    run, kept = loop(settings(optimizer={"type": kind}, max_steps=30))
    run.run(tickets())
    assert kept.values[-1] < 0.9 * kept.values[0]


@pytest.mark.parametrize("changes", [
    {}, {"attention": "flex"}, {"activation_checkpointing": True},
    {"torch_compile": {"enabled": True}},
    {"torch_compile": {"enabled": True}, "activation_checkpointing": True},
    {"torch_compile": {"enabled": True}, "attention": "flex"},
])  # fmt: skip
@pytest.mark.parametrize("objectives", [{}, DISTILLED])
def test_sharded_it_loses_as_unsharded(group: None, changes: dict, objectives: dict) -> None:
    plain, expected = loop(settings(objectives=objectives))
    plain.run(tickets())
    run, kept = loop(settings(objectives=objectives, **changes), sharded=True)
    run.run(tickets())
    np.testing.assert_allclose(kept.values, expected.values, rtol=2e-2)
    assert kept.values[-1] < kept.values[0]
    assert all(p.dtype == torch.float32 and p.is_cuda for p in run.model.parameters())
    for layer in bit_linears(run.model):
        assert set(layer.quantized()[0].unique().tolist()) <= {-1, 0, 1}


def test_saved_beside_training_and_resumed(group: None, tmp_path: Path) -> None:
    whole, expected = loop(settings(), sharded=True)
    whole.run(tickets())
    half, first = loop(settings(), sharded=True)
    half.hooks = [Every(6, lambda each: setattr(each, "stopped", True))]
    half.run(tickets())
    directory, saver = str(tmp_path / "step"), checkpoint.Saver()
    held = state.as_json(half.position, {"step": half.data_step})
    saver.save(directory, state.tensors_of(half.model, half.optimizer), held)
    with torch.no_grad():
        for parameter in half.model.parameters():
            parameter.zero_()  # what is written was copied before
    saver.wait()
    saver.close()
    rest, second = loop(settings(), sharded=True)
    rest.position, data = state.resume(directory, rest.model, rest.optimizer, Resume())
    assert data is not None and rest.position.step == 6
    rest.data_step = data["step"]
    rest.run(islice(tickets(), 2 * rest.data_step, None))
    np.testing.assert_allclose(first.values + second.values, expected.values, rtol=1e-4)

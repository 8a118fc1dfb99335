"""The wrapped model as the root of FSDP2 on two gloo workers, against one unsharded worker."""

from pathlib import Path
from typing import Any

import ranks
import torch
import torch.distributed as dist
from tiny_models import make_batch, make_model
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn import Module
from transformers import PreTrainedModel

from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.families import decoder_layers
from bitray.models.isolation import check_documents_isolated
from bitray.models.loading import load_model, save_model
from bitray.models.losses import LossModel, Term, run_teacher
from bitray.nn import bit_linears, set_strength
from bitray.objectives import AttentionDistill, ContinuePretrain, HiddenDistill, LogitsDistill

# Micro-batches dealt to workers in turn; the last one is an empty ticket, on worker 1.
ROWS = [[[10, 12], [24]], [[24], [7, 7]], [[3, 20], []], [[], []]]
HEAD = [Term("ce", ContinuePretrain(), 0.01), Term("kl", LogitsDistill(), 0.02)]
LAYERS = [Term("hidden", HiddenDistill(), 0.03)]
ATTENTION = Term("attention", AttentionDistill(), 0.05)


def _student() -> LossModel:
    return LossModel(to_bitnet(make_model(tie_word_embeddings=True)), chunk_tokens=7)


def _teacher() -> PreTrainedModel:
    return make_model(seed=1).eval().requires_grad_(False)


def _batches() -> list[Batch]:
    return [make_batch(rows, width=24, seed=seed) for seed, rows in enumerate(ROWS)]


def _accumulate(model: LossModel, teacher: PreTrainedModel, batches: list[Batch]) -> torch.Tensor:
    """Gradients of the sum over micro-batches, reduced with the last one only."""
    total = torch.zeros(())
    for index, batch in enumerate(batches):
        if isinstance(model, FSDPModule):
            model.set_requires_gradient_sync(index == len(batches) - 1)
        told = run_teacher(teacher, batch, layers=True, attention=-1)
        loss, _ = model(batch, HEAD, LAYERS, told, attention=ATTENTION)
        loss.backward()
        total += loss.detach()
    return total


def _shard(model: Module, layers: Any) -> None:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in (*layers, model):
        fully_shard(module, mesh=mesh)
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def _scene(model: LossModel, teacher: PreTrainedModel, folder: str) -> dict[str, Any]:
    batches = _batches()[dist.get_rank() :: 2]
    set_strength(model, 0.5)
    blended = _accumulate(model, teacher, batches)
    model.zero_grad()
    set_strength(model, 1.0)
    loss = torch.stack([blended, _accumulate(model, teacher, batches)])
    dist.all_reduce(loss)
    gradients = [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]
    check_documents_isolated(model, "cpu")
    codes = [layer.quantized() for layer in bit_linears(model)]
    save_model(model.model, folder)
    return {"loss": loss, "gradients": gradients, "codes": codes}


def _sharded(folder: Path) -> list[Any]:
    rank = dist.get_rank()
    model, teacher = _student(), _teacher()
    _shard(teacher, decoder_layers(teacher))
    layers = decoder_layers(model.model)
    _shard(model, layers)
    plain = _scene(model, teacher, str(folder / "plain"))

    model = _student()
    layers = decoder_layers(model.model)
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)
    _shard(model, layers)
    checkpointed = _accumulate(model, teacher, _batches()[rank::2])
    gradients = [p.grad.full_tensor() for p in model.parameters()]  # type: ignore[union-attr]
    return [plain, checkpointed, gradients]


def test_two_workers_are_one(tmp_path: Path) -> None:
    """Tied head, accumulation, an empty ticket, a sharded teacher, blended and full strength."""
    workers = ranks.run(_sharded, tmp_path, tmp_path)
    model, teacher = _student(), _teacher()
    set_strength(model, 0.5)
    blended = _accumulate(model, teacher, _batches())
    model.zero_grad()
    set_strength(model, 1.0)
    loss = torch.stack([blended, _accumulate(model, teacher, _batches())])
    expected = [p.grad for p in model.parameters()]
    for plain, _, recomputed in workers:
        torch.testing.assert_close(plain["loss"], loss, rtol=1e-6, atol=0)
        torch.testing.assert_close(plain["gradients"], expected, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(recomputed, plain["gradients"], rtol=0, atol=0)
        for (codes, scale), layer in zip(plain["codes"], bit_linears(model), strict=True):
            assert torch.equal(codes, layer.quantized()[0])
            assert torch.equal(scale, layer.quantized()[1])
    saved = load_model(str(tmp_path / "plain")).state_dict()
    for name, tensor in model.model.state_dict().items():
        assert torch.equal(saved[name], tensor)

"""How a model is laid over the workers: checkpointed, compiled, then sharded - in that order."""

import os
from collections.abc import Callable
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from transformers import PreTrainedModel

from bitray.models.attention import attend_by_blocks
from bitray.models.families import decoder_layers
from bitray.models.losses import LossModel
from bitray.nn import bit_linears
from bitray.nn.product import kernel_problem
from bitray.settings import UserError
from bitray.training.fp8 import capability_of
from bitray.training.settings import TrainingSettings

T = TypeVar("T")


def world() -> tuple[int, int]:
    """(rank, world size) of the default process group; (0, 1) without one."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def with_losses(
    model: PreTrainedModel, settings: TrainingSettings, device: torch.device
) -> LossModel:
    """A model with its losses, on its device, attending as the settings say."""
    if settings.attention == "flex":
        attend_by_blocks(model, device)
    return LossModel(model, settings.logits_chunk).to(device)


def parallelize(
    model: LossModel, settings: TrainingSettings, device: torch.device, hybrid: bool = False
) -> LossModel:
    """Lay the model over the workers, in place. One worker is not sharded. `hybrid` shards over the
    workers of a node and replicates between nodes: what layers gather stays inside a node."""
    layers = decoder_layers(model.model)
    if settings.fp8.enabled and bit_linears(model):
        told = all_gather_objects(settings.fp8.problem(device.type, capability_of(device)))
        if any(told):
            raise UserError(f"training.{next(filter(None, told))}")
        settings.fp8.apply(model.model)
    if settings.int8_kernel:
        if any(told := all_gather_objects(kernel_problem(device))):
            why = next(filter(None, told))
            raise UserError(f"training.int8_kernel: {why}; set int8_kernel=false")
        for layer in bit_linears(model):
            layer.int8_kernel = True
    if settings.torch_compile.enabled:
        _compile(layers, settings)
    if settings.activation_checkpointing:
        # Outside of the compiled forward and of our own hooks, which must run once and not again
        # in the recomputation.
        for index, layer in enumerate(layers):
            layers[index] = checkpoint_wrapper(layer, preserve_rng_state=False)
    if world()[1] > 1:
        _shard(model, layers, _mesh(device, hybrid))
    return model


def _mesh(device: torch.device, hybrid: bool) -> DeviceMesh:
    size, here = world()[1], int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if not hybrid:
        return init_device_mesh(device.type, (size,))
    if len(set(all_gather_objects(here))) > 1 or here in (1, size):
        raise UserError(
            "scaling.sharding: hybrid needs several nodes with as many workers each, more than "
            f"one; there are {size} workers, {here} on this node: take full"
        )
    return init_device_mesh(device.type, (size // here, here), mesh_dim_names=("node", "worker"))


def _compile(layers: nn.ModuleList, settings: TrainingSettings) -> None:
    options, attention = settings.torch_compile, settings.objectives.attention_distill
    hooked = None
    if attention is not None and "attention_distill" in settings.learnt:
        # Compiled, it would not call the hooks on the projections whose relations are distilled.
        hooked = layers[attention.layer]
    for layer in (each for each in layers if each is not hooked):
        # The forward, not the module: names in state dicts and hooks stay as they are.
        layer.forward = torch.compile(layer.forward, mode=options.mode, fullgraph=options.fullgraph)


def _shard(model: LossModel, layers: nn.ModuleList, mesh: DeviceMesh) -> None:
    """FSDP2. Masters are gathered in fp32: the ternary decision is taken from them (SEMANTICS)."""
    for layer in layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            # Losses are divided by global counts already, so gradients are summed, not averaged.
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def synchronize_gradients(model: nn.Module, on: bool) -> None:
    """Reduce gradients in the next backward or keep accumulating (no effect on one worker)."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(on)


def from_rank_zero(ask: Callable[[], T]) -> T:
    """What `ask` answers on rank 0, on every worker; its `UserError` or `OSError` likewise, since
    one that stopped alone would leave the others waiting."""
    answer: list[Any] = [None]
    if world()[0] == 0:
        try:
            answer = [ask()]
        except (UserError, OSError) as error:
            answer = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(answer, src=0)
    if isinstance(answer[0], UserError | OSError):
        raise answer[0]
    return cast(T, answer[0])


def on_rank_zero(work: Callable[[], T]) -> T | None:
    """What `work` gives, on rank 0 alone, where it stays; its errors are those of every worker."""
    done: list[T] = []
    from_rank_zero(lambda: done.append(work()))
    return done[0] if done else None


def all_reduce_sums(values: torch.Tensor) -> torch.Tensor:
    """Sum over workers, in place."""
    if dist.is_initialized():
        dist.all_reduce(values)
    return values


def all_gather_objects(mine: T) -> list[T]:
    """What every worker gives, in the order of ranks."""
    found: list[Any] = [mine]
    if dist.is_initialized():
        found = [None] * dist.get_world_size()
        dist.all_gather_object(found, mine)
    return found

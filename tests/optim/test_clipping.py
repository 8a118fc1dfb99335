"""The global norm is that of the whole gradient, however it is laid over workers."""

import math
from pathlib import Path

import pytest
import ranks
import shared_net
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from bitray.optim import clip_grad_norm


def _parameters(*gradients: Tensor) -> list[nn.Parameter]:
    parameters = [nn.Parameter(torch.zeros_like(g)) for g in gradients]
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient.clone()
    return parameters


def _gradients() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in ((5, 3), (7,), ())]


def test_norm_and_scaling():
    gradients = _gradients()
    parameters = _parameters(*gradients)
    expected = torch.cat([g.flatten() for g in gradients]).norm()
    norm = clip_grad_norm(parameters, 0.5)
    torch.testing.assert_close(norm, expected)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient * 0.5 / expected)
    torch.testing.assert_close(clip_grad_norm(parameters, None), torch.tensor(0.5))


@pytest.mark.parametrize("max_norm", [None, 1e3])
def test_small_gradients_are_left_alone_bit_by_bit(max_norm):
    gradients = _gradients()
    parameters = _parameters(*gradients)
    clip_grad_norm(parameters, max_norm)
    assert all(torch.equal(p.grad, g) for p, g in zip(parameters, gradients, strict=True))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_norm_that_is_not_finite_is_reported_and_nothing_is_touched(bad):
    gradients = [*_gradients(), torch.tensor([1.0, bad])]
    parameters = _parameters(*gradients)
    norm = clip_grad_norm(parameters, 1.0)
    assert not norm.isfinite()
    for parameter, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=0, atol=0, equal_nan=True)


def test_large_gradients_have_a_finite_norm():
    """1e25 squared is beyond fp32, 1e25 is not."""
    parameters = _parameters(torch.full((4,), 1e25))
    assert clip_grad_norm(parameters, 1.0).item() == pytest.approx(2e25, rel=1e-5)
    assert parameters[0].grad.norm().item() == pytest.approx(1.0, rel=1e-5)


def test_the_norm_of_many_elements_is_exact():
    """Adding 4 million squares in fp32 is off by about 1e-4, another way for every sharding."""
    gradient = torch.randn(4_000_000, generator=torch.Generator().manual_seed(0))
    norm = clip_grad_norm(_parameters(gradient), None)
    assert norm.item() == pytest.approx(gradient.double().norm().item(), rel=1e-6)


def test_half_precision_gradients_are_measured_in_fp32():
    parameters = _parameters(torch.full((70_000,), 0.1, dtype=torch.bfloat16))
    expected = math.sqrt(70_000) * torch.tensor(0.1, dtype=torch.bfloat16).item()
    assert clip_grad_norm(parameters, None).item() == pytest.approx(expected, rel=1e-5)


def test_parameters_without_a_gradient_do_not_count():
    assert clip_grad_norm([nn.Parameter(torch.ones(3))], 1.0) == 0
    assert clip_grad_norm([], 1.0) == 0


def _clip(max_norm: float) -> dict[str, Tensor]:
    module = shared_net.shard(shared_net.model())
    shared_net.backward(module, step=0)
    norm = clip_grad_norm(module.parameters(), max_norm)
    assert type(norm) is Tensor
    gradients = {name: shared_net.whole(p.grad) for name, p in module.named_parameters()}
    return {"norm": norm, "again": clip_grad_norm(module.parameters(), None), **gradients}


def _norm_of_replicas() -> Tensor:
    """Copies on several workers are one gradient; a plain one beside them counts once, too."""
    replicated, plain = _parameters(torch.full((3, 3), 2.0), torch.full((4,), 4.0))
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        layout = (mesh, [Replicate(), Shard(0)])
        gradient = distribute_tensor(replicated.grad, *layout)
        replicated = nn.Parameter(distribute_tensor(replicated.data, *layout))
        replicated.grad = gradient
    return clip_grad_norm([replicated, plain], 1.0)


def _on_workers() -> tuple[dict[str, Tensor], Tensor]:
    return _clip(0.1), _norm_of_replicas()


def test_two_fsdp_workers_clip_like_one(tmp_path: Path):
    alone = _clip(0.1)
    assert alone["norm"] > 0.2
    torch.testing.assert_close(alone["again"], torch.tensor(0.1), rtol=1e-4, atol=0)
    (first, replicas), (second, _) = ranks.run(_on_workers, tmp_path)
    assert torch.equal(first["norm"], second["norm"])
    torch.testing.assert_close(first, alone, rtol=1e-5, atol=1e-7)
    assert replicas == _norm_of_replicas() == 10

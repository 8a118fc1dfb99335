"""A model whose parts no number of workers can share evenly."""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Net(nn.Module):
    """Shapes that two workers cannot share evenly: 7 rows, 3 rows, and a single one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(5, 7)
        self.norm = nn.RMSNorm(7)
        self.layers = nn.ModuleList([nn.Linear(7, 7), nn.Linear(7, 3), nn.Linear(3, 9)])
        self.head = nn.Linear(9, 1)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.norm(self.embed(inputs).tanh())
        for layer in self.layers:
            hidden = layer(hidden)
        return self.head(hidden)


def model() -> nn.Module:
    """A model with decoder blocks, of a sort."""
    torch.manual_seed(0)
    return Net()


def shard(module: nn.Module) -> nn.Module:
    """FSDP2 where there is a process group; gradients are averaged over workers."""
    if dist.is_initialized():
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        for layer in module.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(module, mesh=mesh)
    return module


def backward(module: nn.Module, step: int) -> Tensor:
    """Gradients of the mean over 8 rows, of which each worker has its part."""
    inputs = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
    if dist.is_initialized():
        inputs = inputs.chunk(dist.get_world_size())[dist.get_rank()]
    loss = (module(inputs) - inputs.sum(-1, keepdim=True)).square().mean()
    loss.backward()
    return loss.detach()


def whole(tensor: Tensor) -> Tensor:
    """A plain copy of a tensor, sharded or not."""
    full = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full.detach().clone()

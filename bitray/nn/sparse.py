"""Sparse activations (Q-Sparse, arXiv 2407.10969): of every group the largest are kept."""

import torch
from jaxtyping import Float
from torch import Tensor, library, nn


def sparse(x: Float[Tensor, "*tokens in"], kept: Tensor, block: int | None) -> Tensor:
    """Zeros in place of all but the `kept` of largest magnitude of every `block` consecutive ones,
    or of a token; the gradient passes straight through."""
    return _Sparse.apply(x, kept, block)


class _Sparse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor, kept: Tensor, block: int | None) -> Tensor:
        if block is None:
            return x * largest(x, kept)
        width = x.shape[-1]
        groups = nn.functional.pad(x, (0, -width % block)).unflatten(-1, (-1, block))
        return x * largest(groups, kept).flatten(-2)[..., :width]

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> tuple[Tensor | None, ...]:
        return grad, None, None


@library.custom_op("bitray::largest", mutates_args=())
def largest(x: Tensor, kept: Tensor) -> Tensor:
    """Whether an element is among the `kept` of largest magnitude of the last axis, exactly so
    many. Opaque to compilers: their graph would hold the number, which changes in a warm-up, and a
    sort that takes it as a tensor costs five times a `topk`. The tensor lies on the CPU, so that
    reading it waits for no GPU."""
    found = x.abs().topk(int(kept), dim=-1, sorted=False).indices
    return torch.zeros_like(x, dtype=torch.bool).scatter_(-1, found, True)


@largest.register_fake
def _(x: Tensor, kept: Tensor) -> Tensor:
    return torch.empty_like(x, dtype=torch.bool)

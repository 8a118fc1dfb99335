"""Low-rank corrections of a ternary model: putting them in, their start, and training them alone.

Q(W) stays as it is; what is fitted are U and V (Scetbon and Hensman, arXiv 2412.07902).
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitray.models.batch import Batch
from bitray.models.packed import last_hidden
from bitray.nn import BitLinear, LowRank, LowRankCorrection, int8_per_token, rank_of

DAMPING = 1e-2
"""Added to the diagonal of an input covariance, relative to its mean, as in the paper."""


def corrected_layers(model: nn.Module) -> dict[str, BitLinear]:
    """Ternary layers that have a correction, by name, in the order in which they run."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BitLinear) and module.correction is not None
    }


def add_corrections(model: PreTrainedModel, rank: float | int) -> None:
    """Give every ternary layer a correction that changes nothing yet; the config remembers it.

    `UserError` for a rank larger than a layer.
    """
    for module in model.modules():
        if isinstance(module, BitLinear):
            size = rank_of(rank, module.in_features, module.out_features)
            with torch.device(module.weight.device):
                module.correction = LowRankCorrection(module.in_features, module.out_features, size)
    model.config.bitray = {**model.config.bitray, "lrc_rank": rank}


def train_corrections_only(model: nn.Module) -> None:
    """Freeze everything but U and V."""
    model.requires_grad_(False)
    for layer in corrected_layers(model).values():
        assert layer.correction is not None
        layer.correction.requires_grad_(True)


def init_corrections(
    model: PreTrainedModel,
    settings: LowRank,
    original: Mapping[str, Tensor],
    batch: Batch,
    loss: Callable[[], float],
) -> str | None:
    """Set U and V from the `original` weights (by their dense names) and a calibration batch.

    Where `loss()`, taken before and after, has risen, the model is left as it was, which the
    sentence that is returned says.
    """
    if settings.init == "kaiming":
        return None
    before = loss()
    if settings.init == "svd":
        svd_start(model, original)
    else:
        closed_form(model, original, batch)
    after = loss()
    if after <= before:
        return None
    for layer in corrected_layers(model).values():
        assert layer.correction is not None
        layer.correction.reset_parameters()
    return (
        f"lrc.init: {settings.init} raises the loss on the calibration batch from {before:.4f} to "
        f"{after:.4f}; it is dropped, the corrections start from kaiming"
    )


# ------------------------------------------------------------------------------------- the starts


@torch.no_grad()
def svd_start(model: PreTrainedModel, original: Mapping[str, Tensor]) -> None:
    """U V^T as the best approximation of W - Q(W) of its rank, singular values split on both."""
    for name, layer in corrected_layers(model).items():
        assert layer.correction is not None
        rank, quantized = layer.correction.u.shape[1], _quantized(layer)
        error = original[f"{name}.weight"].to(quantized) - quantized
        left, values, right = torch.linalg.svd(error, full_matrices=False)
        root = values[:rank].sqrt()
        _set(layer, left[:, :rank] * root, right[:rank].T * root)


@torch.no_grad()
def closed_form(model: PreTrainedModel, original: Mapping[str, Tensor], batch: Batch) -> None:
    """U V^T as the minimiser of `|W x - Q(W) Qa(x) - U V^T x|^2` over the batch's real tokens.

    One forward: each layer is solved for what arrives after those before it have been solved.
    """
    handles = []
    for name, layer in corrected_layers(model).items():
        solve = partial(_solve_for_input, layer, original[f"{name}.weight"], batch.real)
        assert layer.correction is not None
        handles.append(layer.correction.register_forward_pre_hook(solve))
    try:
        last_hidden(model, batch)
    finally:
        for handle in handles:
            handle.remove()


def _solve_for_input(
    layer: BitLinear, weight: Tensor, real: Bool[Tensor, "batch length"], _: nn.Module, args: Any
) -> None:
    x = args[0][real].double()
    codes, scale = int8_per_token(args[0][real])
    missing = x @ weight.to(x).T - (codes * scale).double() @ _quantized(layer).T
    assert layer.correction is not None
    _set(layer, *reduced_rank_regression(x, missing, layer.correction.u.shape[1]))


def reduced_rank_regression(
    x: Float[Tensor, "n in"], y: Float[Tensor, "n out"], rank: int
) -> tuple[Float[Tensor, "out rank"], Float[Tensor, "in rank"]]:
    """U and V that minimise `|y - x V U^T|^2`, damped: from the covariances of x and of y with x.

    With `x^T x = L L^T`, U holds the leading left singular vectors of `y^T x L^-T`.
    """
    covariance = x.T @ x
    damping = DAMPING * covariance.diagonal().mean().clamp_min(torch.finfo(x.dtype).tiny)
    lower = torch.linalg.cholesky(covariance + damping * torch.eye(len(covariance)).to(x))
    whitened = torch.linalg.solve_triangular(lower, x.T @ y, upper=False)
    _, _, directions = torch.linalg.svd(whitened, full_matrices=False)
    u = directions[:rank].T
    return u, torch.linalg.solve_triangular(lower.T, whitened @ u, upper=True)


def _quantized(layer: BitLinear) -> Tensor:
    codes, scale = layer.quantized()
    return (codes * scale).double()


def _set(layer: BitLinear, u: Tensor, v: Tensor) -> None:
    assert layer.correction is not None
    layer.correction.u.copy_(u)
    layer.correction.v.copy_(v)

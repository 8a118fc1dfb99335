"""Conversion (Stage 1): a dense model's projections become BitLinear, with SubLN where asked."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformers import PreTrainedModel

from bitray.models.batch import Batch
from bitray.models.families import Family, decoder_layers, expert_paths, family_of, norm_eps
from bitray.models.packed import last_hidden
from bitray.nn import BitLinear, SubLN, bit_linears, set_strength, strength_of
from bitray.settings import UserError, nearest

SubLNChoice = Literal["paper", "all", "none"]


def is_bitnet(model: nn.Module) -> bool:
    """Whether `to_bitnet` has been here."""
    return bool(bit_linears(model))


def to_bitnet(
    model: PreTrainedModel, subln: SubLNChoice = "paper", calibration: Batch | None = None
) -> PreTrainedModel:
    """Replace the projections of every decoder layer by BitLinear, in place; returns the model.

    Embeddings, output head, norms and biases stay; masters become fp32; strength is 1. With a
    `calibration` batch (on the model's device) the gains of SubLN are fitted to it, else they are
    ones. A converted model is returned unchanged. Unknown architectures are a `UserError`.
    """
    if subln not in get_args(SubLNChoice):
        choices = get_args(SubLNChoice)
        raise UserError(
            f"subln: '{subln}' is not one of {', '.join(choices)}{nearest(subln, choices)}"
        )
    if is_bitnet(model):
        return model
    family = family_of(model)
    sites = {"paper": family.paper_subln, "all": family.projections, "none": ()}[subln]
    for index, layer in enumerate(decoder_layers(model)):
        _convert_layer(layer, f"{family.layers}.{index}", family, sites, norm_eps(model.config))
    model.config.bitray = {**(getattr(model.config, "bitray", None) or {}), "subln": subln}
    if calibration is not None and sites:
        calibrate(model, calibration)
    return model


def _convert_layer(
    layer: nn.Module, path: str, family: Family, sites: tuple[str, ...], eps: float
) -> None:
    modules = dict(layer.named_modules())
    for name, where in _places(layer, family):
        linear = modules.get(where)
        if type(linear) is not nn.Linear:  # a subclass may pack or adapt its weight
            found = "missing" if linear is None else f"a {type(linear).__name__}"
            raise UserError(
                f"cannot convert {path}.{where}: it is {found}, not a plain linear layer; "
                "load the model unquantised, with separate projections and without adapters"
            )
        layer.set_submodule(where, BitLinear.from_linear(linear, name in sites, eps))


def _places(layer: nn.Module, family: Family) -> list[tuple[str, str]]:
    """Every projection of the family, and each path at which the layer has it."""
    return [(name, where) for name in family.projections for where in expert_paths(layer, name)]


# ----------------------------------------------------------------------------------- calibration


def calibrate(model: PreTrainedModel, batch: Batch) -> None:
    """Fit every SubLN gain so that the layer changes its input as little as it can (fp64 sums).

    One forward at strength 0: each gain is fitted to what arrives *after* the gains before it have
    been fitted, so errors are not carried from layer to layer unseen.
    """
    strength, training = strength_of(model), model.training
    set_strength(model, 0.0)
    model.eval()
    try:
        with torch.no_grad(), _fitting(model, batch.real):
            last_hidden(model, batch)
    finally:
        set_strength(model, strength)
        model.train(training)


@contextmanager
def _fitting(model: nn.Module, real: Tensor) -> Iterator[None]:
    def fit(norm: nn.Module, args: tuple[Any, ...]) -> None:
        assert isinstance(norm, SubLN)
        norm.weight.copy_(least_squares_gain(args[0], real, norm.eps))

    norms = [module for module in model.modules() if isinstance(module, SubLN)]
    handles = [norm.register_forward_pre_hook(fit) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def least_squares_gain(
    x: Float[Tensor, "batch length width"], real: Bool[Tensor, "batch length"], eps: float
) -> Float[Tensor, " width"]:
    """`g_j = sum_t x_tj n_tj / sum_t n_tj^2` with `n = x / rms(x)`, over real tokens.

    A channel that is silent on the batch gets the gain that fits all channels together.
    """
    x = x[real].double()
    n = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    products, squares = (x * n).sum(0), n.square().sum(0)
    common = products.sum() / squares.sum().clamp_min(torch.finfo(squares.dtype).tiny)
    silent = squares == 0
    return torch.where(silent, common, products / squares.masked_fill(silent, 1.0)).float()

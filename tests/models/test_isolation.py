"""Documents in a row do not see each other, and the start-up check would notice if they did."""

from typing import Any

import pytest
import torch
from tiny_models import make_model

from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.families import FAMILIES
from bitray.models.isolation import check_documents_isolated
from bitray.models.losses import LossModel
from bitray.models.packed import last_hidden
from bitray.settings import UserError


@pytest.mark.parametrize("model_type", FAMILIES)
def test_documents_are_isolated(model_type: str) -> None:
    model = make_model(model_type)
    check_documents_isolated(model, "cpu")
    check_documents_isolated(LossModel(to_bitnet(model), chunk_tokens=5), "cpu")


@pytest.mark.parametrize(
    "leak", [{"use_cache": True}, {"attention_mask": torch.ones(2, 16, dtype=torch.long)}]
)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_ways_in_which_transformers_leaks_are_caught(
    model_type: str, leak: dict[str, Any]
) -> None:
    model = to_bitnet(make_model(model_type))
    base = model.base_model.forward
    model.base_model.forward = lambda **inputs: base(**{**inputs, **leak})
    with pytest.raises(UserError, match="packed documents see each other"):
        check_documents_isolated(model, "cpu")


def test_a_model_that_says_nothing_does_not_pass() -> None:
    for value in (0.0, torch.nan):
        model = make_model()
        torch.nn.init.constant_(model.lm_head.weight, value)
        with pytest.raises(UserError, match="cannot be checked"):
            check_documents_isolated(model, "cpu")


def test_the_check_leaves_no_trace() -> None:
    model = LossModel(make_model(attention_dropout=0.5)).train()
    model.model.model.norm.eval()
    model.model.lm_head.weight.grad = torch.ones_like(model.model.lm_head.weight)
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    check_documents_isolated(model, "cpu")
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert [n for n, p in model.named_parameters() if p.grad is not None] == [
        "model.lm_head.weight"
    ]


@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_packed_document_is_the_document_alone(model_type: str, batch: Batch) -> None:
    """Outputs and gradients: positions restart and nothing else of the row exists."""
    model = to_bitnet(make_model(model_type))
    packed = last_hidden(model, batch)
    start = 0
    for length in (10, 12):  # the documents of the first row
        ids = batch.input_ids[:1, start : start + length]
        alone = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(packed[:1, start : start + length], alone)
        start += length


def test_no_gradient_crosses_a_border(batch: Batch) -> None:
    model = to_bitnet(make_model())
    embedded: list[torch.Tensor] = []

    def keep(_module: Any, _args: Any, out: torch.Tensor) -> None:
        out.retain_grad()
        embedded.append(out)

    model.model.embed_tokens.register_forward_hook(keep)
    last_hidden(model, batch)[0, 10:22].sum().backward()
    reached = embedded[0].grad.abs().sum(-1) > 0  # type: ignore[union-attr]
    assert reached[0, 10:22].all()
    assert reached.sum() == 12

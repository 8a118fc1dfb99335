"""Attention by blocks sees what dense masks show, and gives the same outputs and gradients."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_diffusion import WIDTH, random_view, rows
from tiny_models import VOCABULARY, make_batch, make_model
from torch import Tensor

from bitray.models.attention import FLEX, attend_by_blocks, block_mask
from bitray.models.batch import Batch
from bitray.models.diffusion import MaskedBatch
from bitray.models.isolation import check_documents_isolated
from bitray.models.packed import last_hidden, packed_inputs
from bitray.settings import UserError

LENGTHS = [[7, 150, 90], [200, 40]]
LONG = 256
on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.fixture
def uncompiled() -> Iterator[None]:
    """On CPUs what is compiled of this mask is not always C++."""
    with torch.compiler.set_stance("force_eager"):
        yield


def whole(batch: Batch) -> Tensor:
    """What a batch says of every pair of places, [batch, 1, queries, keys]."""
    places = torch.arange(batch.input_ids.shape[1])
    row = torch.arange(len(batch.input_ids))[:, None, None, None]
    return batch.sees()(row, places[None, None, :, None], places[None, None, None, :])


@given(rows(), st.integers(1, 7), st.integers(1, 2))
def test_views_see_what_their_mask_shows(lengths: list[list[int]], block: int, copies: int) -> None:
    view = random_view(lengths, block, copies)
    assert torch.equal(whole(view), view.attention_mask())


@given(rows())
def test_rows_see_their_documents_up_to_themselves(lengths: list[list[int]]) -> None:
    seen = whole(make_batch(lengths, WIDTH))[:, 0]
    for row, documents in enumerate(lengths):
        expected = torch.zeros(WIDTH, WIDTH, dtype=torch.bool)
        start = 0
        for count in [*documents, WIDTH - sum(documents)]:
            expected[start : start + count, start : start + count] = True
            start += count
        assert torch.equal(seen[row], expected.tril())


@pytest.mark.parametrize("view", [False, True])
def test_hidden_states_by_blocks_are_those_by_masks(uncompiled: None, view: bool) -> None:
    model = make_model().eval()
    batch = make_batch(LENGTHS, LONG)
    if view:
        batch = random_view([[9, 5], [16]], 4)
    inputs = dict(packed_inputs(batch))
    if view:
        inputs["attention_mask"] = batch.attention_mask()
    with torch.no_grad():
        dense = model.base_model(**inputs).last_hidden_state
        inputs["attention_mask"] = block_mask(batch)
        model.config._attn_implementation = FLEX
        blocks = model.base_model(**inputs).last_hidden_state
    torch.testing.assert_close(blocks, dense, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("device", "changes", "why"), [
    ("cpu", {}, "needs GPUs"),
    ("cuda", {"head_dim": 8}, "heads of 16 or wider, these are 8"),
    ("cuda", {"attention_dropout": 0.1}, "no dropout"),
    ("cuda", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0},
     "no sliding_attention"),
])  # fmt: skip
def test_what_flex_attention_does_not_fit(device: str, changes: dict, why: str) -> None:
    model = make_model("qwen2" if "sliding_window" in changes else "llama", **changes)
    with pytest.raises(UserError, match=rf"training\.attention: flex .*{why}.*; take sdpa"):
        attend_by_blocks(model, torch.device(device))
    assert model.config._attn_implementation == "sdpa"


def test_by_blocks_documents_do_not_see_each_other(
    uncompiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model().eval()
    attend_by_blocks(model, torch.device("cuda"))  # in evaluation CPUs can do it
    check_documents_isolated(model, "cpu")
    monkeypatch.setattr(Batch, "sees", lambda _: lambda row, query, key: query >= key)
    with pytest.raises(UserError, match=r"see each other.*with attention 'flex', use 'sdpa'"):
        check_documents_isolated(model, "cpu")


def test_by_blocks_no_whole_mask_is_made(uncompiled: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model, view = make_model().eval(), random_view([[9, 5], [16]], 4)
    model.config.mask_token_id = VOCABULARY - 1
    with torch.no_grad():
        expected = last_hidden(model, view)
        attend_by_blocks(model, torch.device("cuda"))
        monkeypatch.delattr(MaskedBatch, "attention_mask")
        torch.testing.assert_close(last_hidden(model, view), expected, rtol=1e-4, atol=1e-5)


@on_gpu
@pytest.mark.gpu
@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("view", [False, True])
def test_gradients_on_a_gpu_are_those_by_masks(view: bool, compiled: bool) -> None:
    batch: Batch = make_batch(LENGTHS, LONG)
    if view:
        batch = random_view([[9, 5], [16]], 4)
    batch = type(batch)(**{
        name: value.cuda() if isinstance(value, Tensor) else value
        for name, value in vars(batch).items()
    })  # fmt: skip

    def run(by_blocks: bool = True) -> tuple[Tensor, dict[str, Tensor]]:
        model: Any = make_model(num_attention_heads=4, num_key_value_heads=2, head_dim=32).cuda()
        model.config.mask_token_id = VOCABULARY - 1
        if by_blocks:
            attend_by_blocks(model, torch.device("cuda"))
        if compiled:
            for layer in model.model.layers:
                layer.forward = torch.compile(layer.forward)
        with torch.autocast("cuda", torch.bfloat16):
            hidden = last_hidden(model, batch)
        hidden.float().square().sum().backward()
        return hidden, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    hidden, grads = run()
    expected, slopes = run(by_blocks=False)
    torch.testing.assert_close(hidden, expected, rtol=5e-2, atol=5e-2)
    assert grads.keys() == slopes.keys()
    for name, grad in grads.items():
        assert torch.cosine_similarity(grad.flatten(), slopes[name].flatten(), dim=0) > 0.999, name

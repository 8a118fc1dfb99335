"""QK-clip against logits computed by hand, head by head."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.models.losses import capturing
from bitray.models.packed import last_hidden
from bitray.nn.quantize import ternary
from bitray.optim import Muon, MuonClip
from bitray.optim.muonclip import clip, largest_logits, measure

CONFIG = {
    "model_type": "qwen2", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True, "initializer_range": 0.3,
}  # fmt: skip
DOCUMENTS = [10, 9]


def _model(seed: int = 0, **changes: object) -> nn.Module:
    torch.manual_seed(seed)
    model = build_model(CONFIG | changes)
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj"):
            projection = getattr(layer.self_attn, name)
            if projection.bias is not None:
                nn.init.normal_(projection.bias)
    return model.train()


def _batch() -> Batch:
    ids = np.random.default_rng(0).integers(0, 61, (2, 24)).astype(np.int32)
    return Batch.from_rows(ids, [DOCUMENTS] * 2, [0, 0])


def _attentions(model: nn.Module) -> list[nn.Module]:
    return [layer.self_attn for layer in model.model.layers]


def _by_hand(model: nn.Module, batch: Batch) -> Tensor:
    """The largest logit of each head of each layer within documents, causally: [layers, heads]."""
    seen: list[Tensor] = []
    hooks = [
        projection.register_forward_hook(lambda _m, _a, out: seen.append(out.detach()))
        for attention in _attentions(model)
        for projection in (attention.q_proj, attention.k_proj)
    ]
    with torch.no_grad():
        last_hidden(model, batch)
    for hook in hooks:
        hook.remove()
    cos, sin = model.model.rotary_emb(seen[0], batch.position_ids)
    found = []
    for q, k in zip(seen[::2], seen[1::2], strict=True):
        queries, keys = (x.view(2, 24, -1, 8).transpose(1, 2) for x in (q, k))
        queries, keys = apply_rotary_pos_emb(queries, keys, cos, sin)
        heads = []
        for head in range(4):
            logits, start = [], 0
            for length in (*DOCUMENTS, 24 - sum(DOCUMENTS)):
                part = slice(start, start + length)
                table = queries[:, head, part] @ keys[:, head // 2, part].transpose(1, 2) / 8**0.5
                logits.append(table[torch.ones_like(table).tril().bool()].max())
                start += length
            heads.append(torch.stack(logits).max())
        found.append(torch.stack(heads).clamp(min=0))
    return torch.stack(found)


def _measured(model: nn.Module, batch: Batch) -> Tensor:
    for attention in _attentions(model):
        attention.max_logits.zero_()
    last_hidden(model, batch)
    return torch.stack([attention.max_logits for attention in _attentions(model)])


def test_what_is_measured_is_the_largest_logit_within_documents():
    model, batch = _model(), _batch()
    before = last_hidden(model, batch)
    expected = _by_hand(model, batch)
    assert len(measure(model)) == 2
    torch.testing.assert_close(_measured(model, batch), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(last_hidden(model, batch), before), "measuring changes no output"
    assert "measured" not in model.config.to_json_string()


def test_only_training_is_measured():
    model, batch = _model(), _batch()
    measure(model)
    with torch.no_grad():
        assert not _measured(model, batch).any()
    assert not _measured(model.eval(), batch).any()


def test_tiles_miss_nothing():
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, heads, 600, 8, generator=generator) for heads in (4, 2))
    mask = torch.rand(2, 1, 600, 600, generator=generator) < 0.01
    causal = torch.ones(600, 600).tril().bool()
    table = torch.einsum("bhnd,bhmd->bhnm", query, key.repeat_interleave(2, 1)) * 0.5
    for given, allowed in ((None, causal), (mask, mask)):
        expected = table.masked_fill(~allowed, -torch.inf).amax((0, 2, 3))
        torch.testing.assert_close(largest_logits(query, key, given, 0.5), expected)
    additive = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    assert torch.equal(
        largest_logits(query, key, additive, 0.5), largest_logits(query, key, mask, 0.5)
    )


def test_a_logit_that_is_not_finite_clips_nothing():
    query, key = torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4)
    query[0, 0, 1, 0], query[0, 1, 1, 0] = torch.inf, torch.nan
    assert torch.equal(largest_logits(query, key, None, 1.0), torch.tensor([4.0, 4.0]))


def test_heads_are_scaled_by_their_own_factor_and_shared_keys_by_the_smallest():
    model, batch = _model(), _batch()
    attention = _attentions(model)[0]
    before = _by_hand(model, batch)[0]
    with torch.no_grad():
        clip(attention, torch.tensor([0.25, 1.0, 1.0, 1.0]))
    expected = before * torch.tensor([0.25, 0.5, 1.0, 1.0])  # sqrt(own * smallest of the group)
    torch.testing.assert_close(_by_hand(model, batch)[0], expected, rtol=1e-4, atol=1e-5)


def test_ternary_tensors_are_scaled_whole_and_keep_their_codes():
    model, batch = to_bitnet(_model(), "none").train(), _batch()
    attention = _attentions(model)[0]
    before = _by_hand(model, batch)[0]
    codes = [ternary(p.weight.detach())[0] for p in (attention.q_proj, attention.k_proj)]
    with torch.no_grad():
        clip(attention, torch.tensor([0.25, 1.0, 1.0, 1.0]))
    for projection, old in zip((attention.q_proj, attention.k_proj), codes, strict=True):
        assert torch.equal(ternary(projection.weight.detach())[0], old)
    torch.testing.assert_close(_by_hand(model, batch)[0], before * 0.25, rtol=1e-4, atol=1e-5)


def _explode(kind: type, ternary_model: bool, **more: float) -> list[float]:
    """The largest logit before each step of training that wants nothing but large ones."""
    model, batch, found = _model(initializer_range=0.05), _batch(), []
    model = to_bitnet(model, "none").train() if ternary_model else model
    optimizer = kind(lr=0.05, adamw_lr=1e-4, weight_decay=0.0, **more).build(model)
    for _ in range(200):
        projections = [
            projection for a in _attentions(model) for projection in (a.q_proj, a.k_proj)
        ]
        with capturing(projections) as outputs:
            loss = last_hidden(model, batch).mean() * 0
        for q, k in zip(outputs[::2], outputs[1::2], strict=True):
            heads = q.unflatten(-1, (4, 8)), k.unflatten(-1, (2, 8)).repeat_interleave(2, 2)
            loss = loss - (heads[0] * heads[1]).sum(-1).mean()
        found.append(_by_hand(model, batch).max().item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return found


@pytest.mark.parametrize("ternary_model", [False, True])
def test_logits_that_would_explode_stay_under_tau(ternary_model: bool):
    """Also those of the one step between a clip and the next, at 20 times the usual rate."""
    assert _explode(Muon, ternary_model)[-1] > 400
    kept = _explode(MuonClip, ternary_model, tau=100.0)
    assert 90 < max(kept) < 100


def test_it_reports_the_largest_logit_and_forgets_it_after_the_step():
    model, batch = _model(), _batch()
    optimizer = MuonClip(lr=1e-9, tau=1.0).build(model)
    last_hidden(model, batch).sum().backward()
    largest = _by_hand(model, batch).max().item()
    optimizer.step()
    assert optimizer.report() == {
        "max_attention_logit": pytest.approx(largest, rel=1e-4), "qk_clipped_layers": 1.0,
    }  # fmt: skip
    assert not any(attention.max_logits.any() for attention in _attentions(model))
    # the second layer gets other inputs once the first one is clipped
    assert _by_hand(model, batch)[0].max() < 1.01


def test_normalised_queries_are_left_alone_and_it_says_so_once(capsys):
    model = _model(model_type="qwen3", head_dim=8)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer = MuonClip(tau=1e-6).build(model)
    assert capsys.readouterr().out.count("QK-clip is skipped") == 1
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0
    last_hidden(model, _batch())
    optimizer.step()
    assert optimizer.report() == {}
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))

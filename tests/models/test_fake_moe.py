"""Models with experts: the dense model's logits, ternary, saved, reloaded and generating."""

from pathlib import Path

import pytest
import torch
from tiny_models import VOCABULARY, make_model

from bitray.inference import Sampling
from bitray.inference.generation import tokens
from bitray.models import create_fake_moe, load_model, save_model, to_bitnet
from bitray.models import verify_moe_matches_dense as verify
from bitray.models.moe import mixtures
from bitray.nn import BitLinear, IdentityRouter
from bitray.settings import UserError

IDS = torch.randint(0, VOCABULARY, (2, 21), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("router", ["top_k", "identity"])
@pytest.mark.parametrize("model_type", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("subln", [None, "none", "paper", "all"])
def test_copies_give_the_dense_logits(model_type: str, subln: str | None, router: str) -> None:
    """Dense MLPs of silu, ternary ones, and those with SubLN inside."""
    dense = make_model(model_type)
    if subln is not None:
        to_bitnet(dense, subln=subln)
    moe = create_fake_moe(dense, num_experts=4, top_k=2, router=router)
    matches, error = verify(moe, dense, IDS)
    assert matches and error < 1e-3
    assert len(list(mixtures(moe))) == 2 and not list(mixtures(dense)), "the dense one is untouched"
    count = sum(p.numel() for p in moe.model.layers[0].mlp.experts.parameters())
    assert count == 4 * sum(p.numel() for p in dense.model.layers[0].mlp.parameters())


def test_the_defaults_are_8_experts_of_which_2() -> None:
    (first, _) = mixtures(create_fake_moe(make_model()))
    assert len(first.experts) == 8 and first.router.top_k == 2


def test_an_expert_that_is_no_copy_is_noticed() -> None:
    dense = to_bitnet(make_model(), "paper")
    moe = create_fake_moe(dense, num_experts=2, top_k=1, router="identity")
    expert = moe.model.layers[1].mlp.experts[0]
    with torch.no_grad():
        expert.down_proj.weight.neg_()
    matches, error = verify(moe, dense, IDS)
    assert not matches and error > 0.05
    with torch.no_grad():
        expert.down_proj.weight.neg_()
        expert.down_proj.subln.weight.mul_(1.5)
    assert not verify(moe, dense, IDS)[0]


def test_experts_become_ternary_and_dense_ones_may_come_first() -> None:
    """Conversion after the MLPs became experts is conversion before it."""
    dense = make_model()
    late = to_bitnet(create_fake_moe(dense, 3, 2, "identity"), "paper")
    early = create_fake_moe(to_bitnet(make_model(), "paper"), 3, 2, "identity")
    assert all(isinstance(e.up_proj, BitLinear) for m in mixtures(late) for e in m.experts)
    assert late.state_dict().keys() == early.state_dict().keys()
    assert late.config.bitray == early.config.bitray
    assert torch.equal(late(IDS).logits, early(IDS).logits)


@pytest.mark.parametrize("subln", [None, "paper"])
def test_it_is_saved_and_reloaded_strictly(subln: str | None, tmp_path: Path) -> None:
    dense = make_model()
    if subln is not None:
        to_bitnet(dense, subln)
    moe = create_fake_moe(dense, 4, 2)
    with torch.no_grad():
        for parameter in moe.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    save_model(moe, str(tmp_path))
    again = load_model(str(tmp_path))
    assert torch.equal(again(IDS).logits, moe.eval()(IDS).logits)
    assert not verify(again, dense, IDS)[0]
    config = tmp_path / "config.json"
    config.write_text(config.read_text().replace('"num_experts": 4', '"num_experts": 5'))
    with pytest.raises(UserError, match=r"missing weights: .*experts\.4"):
        load_model(str(tmp_path))


def test_an_identity_router_has_nothing_to_save(tmp_path: Path) -> None:
    moe = create_fake_moe(make_model(), 3, 2, "identity")
    save_model(moe, str(tmp_path))
    assert isinstance(next(mixtures(load_model(str(tmp_path)))).router, IdentityRouter)


def test_text_comes_with_a_cache() -> None:
    dense = to_bitnet(make_model(), "paper")
    moe, greedy = create_fake_moe(dense, 4, 2, "identity"), Sampling(temperature=0)
    assert list(tokens(moe, [5, 9], greedy, None)) == list(tokens(dense, [5, 9], greedy, None))


def test_what_cannot_be_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"top_k=3 of num_experts=2"):
        create_fake_moe(make_model(), 2, 3)
    with pytest.raises(UserError, match="already"):
        create_fake_moe(create_fake_moe(make_model(), 2, 1), 2, 1)

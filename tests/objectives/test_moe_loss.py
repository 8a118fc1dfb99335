"""Balance of routers in training: what is summed, what is reported, and that it balances."""

import pytest
import torch

from bitray.models import create_fake_moe, to_bitnet
from bitray.models.batch import Batch
from bitray.models.loading import build_model
from bitray.models.losses import LossModel, Term
from bitray.models.moe import mixtures
from bitray.nn.moe import Routing, load_balancing_loss, z_loss
from bitray.objectives import MoE, Objectives
from bitray.settings import UserError

CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


def model() -> LossModel:
    torch.manual_seed(0)
    made = create_fake_moe(to_bitnet(build_model(CONFIG)), num_experts=4, top_k=2)
    with torch.no_grad():
        for mixture in mixtures(made):
            mixture.router.weight.normal_(std=0.5)
    return LossModel(made)


def batch(seed: int = 0) -> Batch:
    """Two rows of which the second is half padding."""
    ids = torch.randint(0, 61, (2, 24), generator=torch.Generator().manual_seed(seed))
    return Batch.from_rows(ids.numpy(), [[10, 14], [12]], [0, 0])


def seen(wrapped: LossModel, rows: Batch) -> list[Routing]:
    """What the routers decide, by hooks of this test."""
    found: list[Routing] = []
    handles = [
        mixture.router.register_forward_hook(lambda _m, _a, out: found.append(out))
        for mixture in mixtures(wrapped)
    ]
    with torch.no_grad():
        wrapped(rows)
    for handle in handles:
        handle.remove()
    return found


def test_it_is_the_mean_over_layers_times_the_real_tokens() -> None:
    wrapped, rows = model(), batch()
    objective = MoE(z_loss=0.1)
    loss, metrics = wrapped(rows, router_terms=[Term("moe", objective, 0.5)])
    routings, real = seen(wrapped, rows), rows.real.flatten()
    assert len(routings) == 2 and objective.count(rows) == 36
    balance = sum(float(load_balancing_loss(r, real)) for r in routings) / 2
    z = sum(float(z_loss(r, real)) for r in routings) / 2
    assert loss.item() == pytest.approx(0.5 * 36 * (balance + 0.1 * z), rel=1e-5)
    assert metrics["moe/balance"].item() == pytest.approx(36 * balance, rel=1e-5)
    assert metrics["moe/z"].item() == pytest.approx(36 * z, rel=1e-5)
    loss.backward()
    assert all(mixture.router.weight.grad.norm() > 0 for mixture in mixtures(wrapped))


def test_descending_it_balances() -> None:
    """Routers alone learn, and of balance alone: tokens that crowded spread over all experts."""
    wrapped, rows = model(), batch()
    routers = [mixture.router.weight for mixture in mixtures(wrapped)]
    optimizer = torch.optim.AdamW(routers, lr=0.03)

    def worst() -> float:
        real = rows.real.flatten()
        return max(float(load_balancing_loss(each, real)) for each in seen(wrapped, rows))

    before = worst()
    for _ in range(60):
        wrapped(rows, router_terms=[Term("moe", MoE(), 1 / 36)])[0].backward()
        optimizer.step()
        wrapped.zero_grad()
    assert before > 1.15 and worst() < 1.05


def test_no_real_token_is_a_loss_of_zero() -> None:
    wrapped = model()
    rows = Batch.from_rows(batch().input_ids.numpy(), [[], []], [0, 0])
    loss, _ = wrapped(rows, router_terms=[Term("moe", MoE(z_loss=1.0), 1.0)])
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is None or p.grad.isfinite().all() for p in wrapped.parameters())


def test_a_model_without_routers_is_refused_in_one_sentence() -> None:
    wrapped = LossModel(to_bitnet(build_model(CONFIG)))
    with pytest.raises(UserError, match=r"objectives\.moe: the model has no router to balance"):
        wrapped(batch(), router_terms=[Term("moe", MoE(), 1.0)])


def test_its_settings_go_there_and_back() -> None:
    objectives = Objectives(moe=MoE(weight=0.02, z_loss=0.1))
    assert Objectives.model_validate(objectives.model_dump(mode="json")) == objectives
    assert objectives.active(0, 1)["moe"] == 0.02 and not MoE.needs_teacher

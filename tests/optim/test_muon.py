"""Muon against singular value decompositions, torch's own Muon, and one owner per matrix."""

from pathlib import Path

import pytest
import ranks
import shared_net
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from bitray.optim import Muon, muon
from bitray.optim.muon import newton_schulz, spread
from bitray.settings import UserError


@pytest.mark.parametrize("shape", [(7,), (2, 3, 4)])
def test_what_is_no_matrix_is_refused(shape):
    group = Muon().muon_groups(shared_net.model(), "muon")[0]
    group["params"] = [nn.Parameter(torch.zeros(shape))]
    with pytest.raises(UserError, match=r"'muon' works on matrices, .* shape \(") as error:
        muon.MuonOptimizer([group])
    assert len(str(error.value).splitlines()) == 1


@pytest.mark.parametrize("shape", [(32, 32), (48, 16), (16, 48), (1, 8), (8, 1)])
def test_newton_schulz_gives_the_polar_factor_nearly(shape):
    """Same singular vectors; singular values near 1, as the quintic leaves them."""
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    made = u.T @ newton_schulz(matrix, 5) @ v.T  # diagonal: what became of each singular value
    values = made.diagonal()
    torch.testing.assert_close(made, torch.diag(values), rtol=0, atol=1e-8)
    clear = values[s > 0.02 * s.norm()]
    assert len(clear) >= 0.9 * len(values)
    assert (clear > 0.65).all() and (clear < 1.25).all()


def test_newton_schulz_of_zeros_is_zeros():
    assert torch.equal(newton_schulz(torch.zeros(4, 6), 5), torch.zeros(4, 6))


class Blocks(nn.Module):
    """Matrices and biases inside of blocks, a matrix outside of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(11, 6)
        self.layers = nn.ModuleList([nn.Linear(6, 10), nn.Linear(10, 4)])
        self.convolution = nn.Conv1d(2, 2, 3)


def _names(model: nn.Module, group: dict) -> set[str]:
    held = {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in held}


def test_matrices_of_blocks_are_orthogonalised_and_the_rest_is_left_to_adamw():
    model = Blocks()
    groups = Muon(lr=0.1, adamw_lr=0.2, weight_decay=0.3).build(model).param_groups
    names = {group["name"]: _names(model, group) for group in groups}
    assert names == {
        "muon": {"layers.0.weight", "layers.1.weight"},
        "decay": {"embed.weight", "convolution.weight"},
        "no_decay": {"layers.0.bias", "layers.1.bias", "convolution.bias"},
    }
    assert {g["name"]: g["weight_decay"] for g in groups} == {
        "muon": 0.3, "decay": 0.3, "no_decay": 0.0,
    }  # fmt: skip
    assert [g["peak_lr"] for g in groups] == [0.1, 0.2, 0.2]


def test_a_model_without_blocks_is_refused():
    with pytest.raises(UserError, match=r"'muon' is for the matrices .*use 'adamw'"):
        Muon().build(nn.Sequential(nn.Linear(3, 3), nn.RMSNorm(3)))
    model = Blocks()
    model.layers.requires_grad_(False)
    with pytest.raises(UserError, match="can be trained"):
        Muon().build(model)


def _steps(model: nn.Module, optimizers: list[torch.optim.Optimizer]) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(5):
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        for optimizer in optimizers:
            optimizer.step()


def test_is_the_muon_and_the_adamw_of_torch():
    """Theirs works in bf16, so its directions are that far off."""
    ours, theirs, start = Blocks(), Blocks(), Blocks()
    settings = Muon(lr=0.01, adamw_lr=0.02, weight_decay=0.1)
    _steps(ours, [settings.build(ours)])
    held = {id(layer.weight) for layer in theirs.layers}
    rest = [p for p in theirs.parameters() if id(p) not in held]
    adamw = {"lr": 0.02, "betas": settings.betas, "eps": settings.eps}
    _steps(
        theirs,
        [
            torch.optim.Muon(
                [layer.weight for layer in theirs.layers], lr=0.01, weight_decay=0.1,
                momentum=0.95, nesterov=True, adjust_lr_fn="match_rms_adamw",
            ),
            torch.optim.AdamW([p for p in rest if p.ndim > 1], weight_decay=0.1, **adamw),
            torch.optim.AdamW([p for p in rest if p.ndim == 1], weight_decay=0.0, **adamw),
        ],
    )  # fmt: skip
    begin = dict(start.named_parameters())
    for (name, got), expected in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        way = (expected - begin[name]).norm()
        assert (got - expected).norm() < (0.03 if id(expected) in held else 1e-6) * way, name


def _orthogonalised_here() -> Tensor:
    """Shapes that this worker orthogonalises in one step."""
    model = shared_net.shard(shared_net.model())
    seen = []
    original = muon.newton_schulz
    muon.newton_schulz = lambda m, steps: (seen.append(tuple(m.shape)), original(m, steps))[1]
    shared_net.backward(model, 0)
    Muon().build(model).step()
    muon.newton_schulz = original
    return torch.tensor(seen).view(-1, 2)


def test_each_matrix_is_orthogonalised_once_on_one_worker(tmp_path: Path):
    assert not dist.is_initialized()
    everything = sorted(_orthogonalised_here().tolist())
    first, second = ranks.run(_orthogonalised_here, tmp_path)
    assert len(first) and len(second)
    assert sorted([*first.tolist(), *second.tolist()]) == everything == [[3, 7], [7, 7], [9, 3]]


@given(st.lists(st.integers(1, 1000), max_size=40), st.integers(1, 8))
def test_owners_share_the_work(costs: list[int], workers: int):
    owners = spread(costs, workers)
    assert len(owners) == len(costs)
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == w) for w in range(workers)]
    assert max(loads) <= sum(costs) / workers + max(costs, default=0)

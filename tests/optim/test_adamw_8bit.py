"""8-bit AdamW: bitsandbytes' own on one worker, the same on shards, and codes that come back."""

from pathlib import Path

import pytest
import ranks
import shared_net
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from bitray.optim import AdamW, AdamW8bit
from bitray.optim.adamw_8bit import BLOCK, dequantized, quantized

bnb = pytest.importorskip("bitsandbytes")
SETTINGS = AdamW8bit(lr=1e-2, weight_decay=0.1, min_8bit_size=1024)


def _books() -> list[Tensor]:
    return [bnb.functional.create_dynamic_map(signed=signed) for signed in (True, False)]


def _model(rows: int = 64) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Linear(32, rows, bias=False), nn.Linear(32, 16)])
    return model


def _train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> nn.Module:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for parameter in model.parameters():
            draw = torch.randn(parameter.shape, generator=generator)
            if isinstance(parameter, DTensor):
                mesh = parameter.device_mesh
                part = draw.chunk(mesh.size())[mesh.get_local_rank()]
                draw = DTensor.from_local(part, mesh, parameter.placements, shape=parameter.shape,
                                          stride=parameter.stride())  # fmt: skip
            parameter.grad = draw
        optimizer.step()
    return model


def test_is_that_of_bitsandbytes():
    ours, theirs = _model(), _model()
    _train(ours, SETTINGS.build(ours), range(10))
    kept = {"lr": 1e-2, "betas": SETTINGS.betas, "eps": SETTINGS.eps, "min_8bit_size": 1024}
    matrices = [p for p in theirs.parameters() if p.ndim == 2]
    optimizer = bnb.optim.AdamW8bit(matrices, weight_decay=0.1, **kept)
    rest = bnb.optim.AdamW8bit([theirs.layers[1].bias], weight_decay=0.0, **kept)
    rest_step = optimizer.step
    optimizer.step = lambda: (rest_step(), rest.step())
    _train(theirs, optimizer, range(10))
    assert torch.equal(ours.layers[0].weight, theirs.layers[0].weight)
    torch.testing.assert_close(ours.layers[1].weight, theirs.layers[1].weight, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ours.layers[1].bias, theirs.layers[1].bias, rtol=1e-5, atol=1e-6)


def test_large_tensors_have_codes_and_small_ones_do_not_and_a_checkpoint_is_that_of_adamw():
    model = _model()
    optimizer = SETTINGS.build(model)
    _train(model, optimizer, range(3))
    large, small = model.layers[0].weight, model.layers[1].weight
    assert optimizer.state[large]["exp_avg"].dtype == torch.uint8
    assert optimizer.state[small]["exp_avg"].dtype == torch.float32
    other = _model()
    adamw = AdamW(lr=1e-2).build(other)
    adamw.load_state_dict(optimizer.state_dict())
    exact = _model()
    reference = AdamW(lr=1e-2).build(exact)
    _train(exact, reference, range(3))
    got, expected = adamw.state[other.layers[0].weight], reference.state[exact.layers[0].weight]
    assert got["step"] == 3
    error = (got["exp_avg"] - expected["exp_avg"]).norm() / expected["exp_avg"].norm()
    assert 0 < error < 0.03


def test_codes_come_back_bit_by_bit():
    """Also of blocks whose largest value is negative, of zeros, and of a short last block."""
    model = _model(rows=67)
    optimizer = AdamW8bit(lr=1e-2, min_8bit_size=1).build(model)
    for _ in range(20):
        _train(model, optimizer, range(1))
        for parameter in model.parameters():
            for at, book in enumerate(_books()):
                codes = optimizer.state[parameter][("exp_avg", "exp_avg_sq")[at]].flatten()
                values = dequantized(codes, book, optimizer.largest[parameter][at])
                assert torch.equal(dequantized(*_shifted(quantized(values, book), book)), values)
    for book in _books():
        codes, largest = quantized(torch.zeros(300), book)
        assert torch.equal(dequantized(codes, book, largest), torch.zeros(300))


def _shifted(found: tuple[Tensor, Tensor], book: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return found[0], book, found[1]


@pytest.mark.parametrize("seed", range(3))
def test_dequantised_values_of_any_scale_are_found_again(seed):
    generator = torch.Generator().manual_seed(seed)
    for book in _books():
        codes = torch.randint(0, 255, (400, BLOCK), generator=generator, dtype=torch.uint8)
        codes[::2, 7] = 255  # the largest, or none of its kind but the most negative
        codes[1::2, 7] = 0 if book[0] < 0 else 255
        largest = 10 ** (torch.rand(400, generator=generator) * 20 - 12)
        values = dequantized(codes.flatten(), book, largest)
        again = quantized(values, book)
        assert torch.equal(dequantized(again[0], book, again[1]), values)


def _ten_steps(rows: int) -> dict[str, Tensor]:
    model = shared_net.shard(_model(rows))
    _train(model, SETTINGS.build(model), range(10))
    return {name: shared_net.whole(p) for name, p in model.named_parameters()}


@pytest.mark.parametrize("rows", [64, 67])
def test_two_workers_agree_with_one(rows, tmp_path: Path):
    """Where shards end on borders of blocks (32 rows of 32), and where they cut one (34 rows)."""
    alone = _ten_steps(rows)
    for worker in ranks.run(_ten_steps, tmp_path, rows):
        for name, value in alone.items():
            assert (worker[name] - value).norm() <= 1e-6 * value.norm(), name

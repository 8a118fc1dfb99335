"""Where 8-bit floats are switched on, and where they are refused."""

import pytest
import torch
from torch import nn

from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.models.losses import LossModel
from bitray.nn import bit_linears
from bitray.settings import UserError
from bitray.training.fp8 import FP8
from bitray.training.parallel import parallelize
from bitray.training.settings import TrainingSettings


def make_model() -> nn.Module:
    """Key and value projections are 16 wide, all others 32 or more."""
    model = build_model({
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1,
    })  # fmt: skip
    return to_bitnet(model, "none")


@pytest.mark.parametrize(
    ("smallest", "patterns", "count"),
    [(16, (), 14), (32, (), 10), (32, ("*.down_proj",), 8), (16, ("*layers.0.*", "*q_proj"), 6)],
)
def test_small_and_excluded_layers_stay_exact(
    smallest: int, patterns: tuple[str, ...], count: int
) -> None:
    model = make_model()
    names = FP8(enabled=True, min_gemm_size=smallest, exclude_patterns=patterns).apply(model)
    on = [name for name, m in model.named_modules() if getattr(m, "fp8", None) is not None]
    assert names == on and len(names) == count
    assert {layer.fp8 for layer in bit_linears(model)} <= {None, torch.bfloat16}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (FP8(enabled=True), r"no ternary layer is left; .*narrower than fp8.min_gemm_size=512"),
        (FP8(enabled=True, min_gemm_size=16, exclude_patterns=("*.down",)),
         r"no layer is named '\*\.down'"),
    ],
)  # fmt: skip
def test_what_leaves_nothing_to_do_is_refused(settings: FP8, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        settings.apply(make_model())


@pytest.mark.parametrize(
    ("device", "capability", "said"),
    [
        ("cpu", None, "these workers have CPUs"),
        ("cuda", (8, 9), "this one has 8.9"),
        ("cuda", (9, 0), None),
        ("cuda", (10, 0), None),
        ("cuda", None, None),
    ],
)
def test_it_needs_hopper(device: str, capability: tuple[int, int] | None, said: str | None) -> None:
    found = FP8(enabled=True).problem(device, capability)
    assert FP8().problem(device, capability) is None, "off, it asks for nothing"
    if said is None:
        assert found is None
    else:
        assert found is not None and said in found and "9.0" in found


def test_a_worker_without_such_a_gpu_refuses() -> None:
    given = TrainingSettings(max_steps=1, fp8=FP8(enabled=True, min_gemm_size=16))
    with pytest.raises(UserError, match=r"training\.fp8: needs GPUs of compute capability 9\.0"):
        parallelize(LossModel(make_model()), given, torch.device("cpu"))

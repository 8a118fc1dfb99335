"""Model FLOPs utilisation, against sums done by hand."""

import pytest
from transformers import LlamaConfig, Qwen3Config

from bitray.training.flops import flops_per_token, peak_flops


@pytest.mark.parametrize(
    ("name", "tflops"),
    [
        ("NVIDIA A100-SXM4-80GB", 312), ("a100_80gb", 312), ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756), ("h100_80gb", 989), ("NVIDIA H200", 989), ("NVIDIA A10G", 70),
        ("NVIDIA A10", 125), ("a10g_24gb", 70), ("NVIDIA A40", 149.7), ("a40_48gb", 149.7),
        ("NVIDIA GeForce RTX 4090", 165.2), ("rtx4090", 165.2), ("NVIDIA L40S", 362),
        ("NVIDIA L4", 121), ("Tesla T4", 65),
    ],
)  # fmt: skip
def test_peaks_are_found_by_name(name: str, tflops: float) -> None:
    assert peak_flops(name) == tflops * 1e12


def test_an_unknown_device_has_no_peak() -> None:
    assert peak_flops("cpu") is None and peak_flops("AMD Instinct MI300X") is None


def test_flops_of_a_token() -> None:
    """Two layers of four heads of 16 at 128 positions: 12 * 2 * 64 * 128 = 196,608; and a model
    whose heads are wider than its hidden size divided by their number."""
    llama = LlamaConfig(num_hidden_layers=2, hidden_size=64, num_attention_heads=4)
    assert flops_per_token(llama, 1_000_000, 128) == 6_000_000 + 196_608
    qwen = Qwen3Config(num_hidden_layers=2, hidden_size=64, num_attention_heads=4, head_dim=32)
    assert flops_per_token(qwen, 0, 128) == 2 * 196_608


def test_the_utilisation_that_papers_report() -> None:
    """PaLM 540B (appendix B): 238,300 tokens/s on 6,144 chips of 275 TFLOP/s is 46.2 %."""
    palm = LlamaConfig(num_hidden_layers=118, hidden_size=18432, num_attention_heads=48,
                       head_dim=256)  # fmt: skip
    each = flops_per_token(palm, 540_350_000_000, 2048)
    assert 238_300 * each / (6144 * 275e12) == pytest.approx(0.462, abs=0.002)

"""How much of a device's arithmetic a training uses: model FLOPs utilisation (MFU)."""

import re

from transformers import PretrainedConfig

PEAK_TFLOPS = {
    "h100pcie": 756.0, "h100nvl": 835.0, "h100": 989.0, "h200": 989.0, "gh200": 989.0,
    "b200": 2250.0, "a100": 312.0, "a800": 312.0, "a10g": 70.0, "a10": 125.0, "a30": 165.0,
    "a40": 149.7, "a6000": 154.8, "l40s": 362.0, "l40": 181.0, "l4": 121.0, "rtx4090": 165.2,
    "rtx3090": 71.0, "v100": 125.0, "t4": 65.0, "h20": 148.0,
}  # fmt: skip
"""Dense products of 16-bit floats, from the makers' data sheets, by part of the device's name."""


def peak_flops(device: str) -> float | None:
    """FLOP/s of a device by its name, as of CUDA (`NVIDIA A100-SXM4-80GB`) or of a preset
    (`a100_80gb`); None for one that is not in the table."""
    name = re.sub(r"[^a-z0-9]", "", device.lower())
    known = sorted((key for key in PEAK_TFLOPS if key in name), key=len)
    return PEAK_TFLOPS[known[-1]] * 1e12 if known else None


def flops_per_token(config: PretrainedConfig, parameters: int, length: int) -> float:
    """Of a forward and a backward: 6 for every parameter, and 12 for every layer, head, dimension
    of a head and position that attention may look at (PaLM, appendix B). Teachers, influence and
    what activation checkpointing does again are not counted: MFU is of the model alone."""
    heads = config.num_attention_heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    return 6.0 * parameters + 12.0 * config.num_hidden_layers * heads * dim * length

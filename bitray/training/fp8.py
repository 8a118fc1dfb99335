"""Which layers compute in 8-bit floats, and on which GPUs that can be (`training.fp8`)."""

from fnmatch import fnmatch
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from bitray.settings import Settings, UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import nn

NEEDED = (9, 0)
"""Compute capability from which on products of E4M3 with a scale per row exist: Hopper."""


class FP8(Settings):
    """8-bit floats in the products of ternary layers at strength 1, for speed: an approximation
    of BitNet's integers (2.8 % error). Masters, and evaluation, stay exact."""

    enabled: bool = False
    recipe: Literal["rowwise"] = "rowwise"
    """A scale for every row of both factors."""
    accumulator_dtype: Literal["bfloat16"] = "bfloat16"
    """What sums are rounded to; they are taken in fp32."""
    min_gemm_size: int = Field(default=512, ge=16)
    """A layer narrower than this on either side stays exact: there is nothing to gain."""
    exclude_patterns: tuple[str, ...] = ()
    """Layers that stay exact, by name, such as `*.down_proj` or `model.layers.0.*`."""

    def problem(self, device_type: str, capability: tuple[int, int] | None) -> str | None:
        """Why it cannot be on such a device, in one sentence; `capability` None: not known yet."""
        needs = "needs GPUs of compute capability 9.0 (Hopper) or newer"
        if not self.enabled:
            return None
        if device_type != "cuda":
            return f"fp8: {needs}, these workers have CPUs; set fp8.enabled=false"
        if capability is not None and capability < NEEDED:
            mine = ".".join(map(str, capability))
            return f"fp8: {needs}, this one has {mine}; set fp8.enabled=false"
        return None

    def apply(self, model: "nn.Module") -> list[str]:
        """Switch it on where it applies; the names of those layers. `UserError` for a pattern that
        no layer matches, and where no layer is left."""
        import torch

        from bitray.nn import BitLinear
        from bitray.nn.fp8 import ALIGNED

        layers = {name: m for name, m in model.named_modules() if isinstance(m, BitLinear)}
        for pattern in self.exclude_patterns:
            if not any(fnmatch(name, pattern) for name in layers):
                close = nearest(pattern, layers)
                raise UserError(f"fp8.exclude_patterns: no layer is named '{pattern}'{close}")
        chosen = []
        for name, layer in layers.items():
            sizes = (layer.in_features, layer.out_features)
            wide = min(sizes) >= self.min_gemm_size and not any(size % ALIGNED for size in sizes)
            if wide and not any(fnmatch(name, pattern) for pattern in self.exclude_patterns):
                layer.fp8 = getattr(torch, self.accumulator_dtype)
                chosen.append(name)
        if not chosen:
            raise UserError(
                f"fp8: no ternary layer is left; all are excluded, or narrower than "
                f"fp8.min_gemm_size={self.min_gemm_size}, or no multiple of {ALIGNED} wide"
            )
        return chosen


def capability_of(device: "torch.device") -> tuple[int, int] | None:
    """Compute capability of a GPU."""
    import torch

    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None

"""What ternary layers cost: a layer, its integer product, and a whole step, against dense ones.

Medians of the ratios of pairs A B A B in one process, and as spread the distance between their
quartiles. Steps are forward, backward, clipping and AdamW on packed rows of random tokens. On GPUs
all of it runs under bf16 autocast, and blocks are compiled. Judge no ratio whose spread is above
10 %.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import ValidationError
from torch import nn

from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.models.losses import Term
from bitray.nn import BitLinear
from bitray.nn.product import kernel_problem, ternary_product
from bitray.objectives import ContinuePretrain
from bitray.settings import UserError
from bitray.training.loop import autocast_for
from bitray.training.parallel import parallelize, with_losses
from bitray.training.settings import TrainingSettings

EXAMPLES = """
examples:
  python scripts/bench_step.py                       # on CPUs: a layer and a small model
  python scripts/bench_step.py --models 135m 1.7b 4b --json
  python scripts/bench_step.py --models 4b --settings int8_kernel=true attention=flex
"""
LLAMA = {"model_type": "llama", "vocab_size": 49152, "tie_word_embeddings": True,
         "max_position_embeddings": 8192}  # fmt: skip
SHAPES: dict[str, dict[str, Any]] = {
    "small": LLAMA | {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512,
                      "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2},
    "135m": LLAMA | {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
                     "num_attention_heads": 9, "num_key_value_heads": 3},
    "1.7b": LLAMA | {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 24,
                     "num_attention_heads": 32, "num_key_value_heads": 32},
    # Both models and their optimizers have to fit: a third of its 36 layers.
    "4b": {"model_type": "qwen3", "vocab_size": 151936, "tie_word_embeddings": True,
           "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 12,
           "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
"""SmolLM2 135M and 1.7B, Qwen3 4B; `small` is for CPUs."""
ROWS = {"small": (4, 512), "135m": (16, 2048), "1.7b": (8, 2048), "4b": (4, 2048)}


class Line(NamedTuple):
    """One comparison."""

    what: str
    ours: float
    """Milliseconds, the median."""
    dense: float
    ratio: float
    spread: float


def compared(what: str, ours: Callable[[], Any], dense: Callable[[], Any], pairs: int) -> Line:
    """Both, in turn; the first three of each compile and warm up."""
    for call in [ours, dense] * 3:
        seconds(call)
    found = [(seconds(ours), seconds(dense)) for _ in range(pairs)]
    ratios = [a / b for a, b in found]
    low, _, high = statistics.quantiles(ratios, n=4)
    a, b = (statistics.median(each) * 1000 for each in zip(*found, strict=True))
    return Line(what, a, b, statistics.median(ratios), high - low)


def seconds(call: Callable[[], Any]) -> float:
    """Until the device is done."""
    synchronize()
    began = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - began


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def layers(
    size: tuple[int, int, int], device: torch.device, pairs: int, int8_kernel: bool = False
) -> Line:
    """Forward and backward of one layer, compiled."""
    tokens, inner, outer = size
    x = torch.randn(tokens, inner, device=device, requires_grad=True)

    def of(layer: nn.Module) -> Callable[[], None]:
        run = torch.compile(layer.to(device))

        def call() -> None:
            with autocast_for(device, "auto"):
                run(x).float().square().mean().backward()

        return call

    what = f"layer {tokens}x{inner}x{outer}{', int8 kernel' if int8_kernel else ''}"
    ternary = BitLinear(inner, outer)
    ternary.int8_kernel = int8_kernel
    return compared(what, of(ternary), of(nn.Linear(inner, outer, bias=False)), pairs)


def products(tokens: int, inner: int, outer: int, device: torch.device, pairs: int) -> Line:
    """The product of codes, scaled, against the bare product of what training would else use."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    kernel = kernel_problem(device) is None
    x = torch.randint(-127, 128, (tokens, inner), device=device, dtype=torch.int8)
    w = torch.randint(-1, 2, (outer, inner), device=device, dtype=torch.int8)
    dense_x, dense_w = torch.randn_like(x, dtype=dtype), torch.randn_like(w, dtype=dtype)
    scale, weight_scale = torch.rand(tokens, 1, device=device), torch.rand((), device=device)

    def ours() -> None:
        for _ in range(10):
            ternary_product(x, scale, w, weight_scale, None, dtype, kernel)

    def dense() -> None:
        for _ in range(10):
            nn.functional.linear(dense_x, dense_w)

    return compared(f"integer product {tokens}x{inner}x{outer}", ours, dense, pairs)


def steps(name: str, changes: dict[str, str], device: torch.device, pairs: int) -> Line:
    """A whole step of a model against that of the dense one."""
    rows, width = ROWS[name]
    numbers = np.random.default_rng(0)
    ids = numbers.integers(0, SHAPES[name]["vocab_size"], (rows, width))
    lengths = [[width // 4, width // 2, width // 4]] * rows
    batch = Batch.from_rows(ids, lengths, [0] * rows).to(device)
    compiled = {"torch_compile": {"enabled": device.type != "cpu"}}
    term = Term("ce", ContinuePretrain(), 1 / ids.size)

    def of(ternary: bool) -> Callable[[], None]:
        settings = TrainingSettings.model_validate(compiled | (changes if ternary else {}))
        with device:
            model = build_model(SHAPES[name])
        if ternary:
            to_bitnet(model, subln="none")
        wrapped = parallelize(with_losses(model.train(), settings, device), settings, device)
        optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-5, fused=True)

        def call() -> None:
            with autocast_for(device, "auto"):
                loss, _ = wrapped(batch, [term])
            loss.backward()
            nn.utils.clip_grad_norm_(wrapped.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()

        return call

    return compared(f"step of {name}, {rows}x{width} tokens", of(True), of(False), pairs)


def lines(models: list[str], changes: dict[str, str], pairs: int) -> Iterator[Line]:
    """All comparisons that fit the device at hand."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = [(16384, width, width) for width in (2048, 4096, 8192)]
    for size in sizes if device.type == "cuda" else [(2048, 1024, 1024)]:
        for int8_kernel in [False, True] if kernel_problem(device) is None else [False]:
            torch.compiler.reset()  # else sizes become dynamic
            yield layers(size, device, pairs, int8_kernel)
        yield products(*size, device, pairs)
    for name in models:
        torch.compiler.reset()
        yield steps(name, changes, device, pairs)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("--models", nargs="+", default=["small"], help=", ".join(SHAPES))
    parser.add_argument("--settings", nargs="+", default=[], metavar="KEY=VALUE",
                        help="of the ternary model's training")  # fmt: skip
    parser.add_argument("--pairs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    said = parser.parse_args()
    try:
        if unknown := set(said.models) - set(SHAPES):
            raise UserError(f"--models: {min(unknown)} is none of {', '.join(SHAPES)}")
        if said.pairs < 2:
            raise UserError("--pairs: two at least, since a spread is told")
        changes = dict(each.partition("=")[::2] for each in said.settings)
        try:
            TrainingSettings.model_validate(changes)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise UserError(f"--settings: {where}: {first['msg']}") from error
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    found = []
    for line in lines(said.models, changes, said.pairs):
        found.append(line)
        if not said.json:
            print(f"{line.what:48} {line.ours:9.3f} ms  dense {line.dense:9.3f} ms  "
                  f"ratio {line.ratio:5.2f}  spread {line.spread:4.0%}", flush=True)  # fmt: skip
    if said.json:
        print(json.dumps([line._asdict() for line in found]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

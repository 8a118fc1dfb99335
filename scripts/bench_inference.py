"""Size, memory and speed of every exported type against f16, and of our own generation.

A ternary model is exported to every type that can hold it and run by llama.cpp (llama-cpp-python),
for every context and number of threads; then the checkpoint itself by bitray's own generation, in
every mode that there is. Each figure is a process of its own, so that memory is that of one model;
all take turns, so that a busy machine is busy for all, and medians are shown. I2_S runs in
bitnet.cpp only: of it there is the size.

  python scripts/bench_inference.py
  python scripts/bench_inference.py --checkpoint runs/bitray_demo
  python scripts/bench_inference.py --contexts 128 1024 --threads 1 2 4 --json > inference.json

Prompt: tokens of context read a second. Speed: tokens made a second behind that context. Memory:
what the process grew by, with the model and a cache for context and new tokens.
"""

import argparse
import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitray.inference import Sampling

SHAPE = {
    "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12,
    "num_attention_heads": 12, "num_key_value_heads": 12, "max_position_embeddings": 2048,
    "vocab_size": 8192,
}  # fmt: skip
"""Of the model that is made where no checkpoint is given: 100 M parameters, random weights."""
QUICK = {**SHAPE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
         "num_attention_heads": 4, "num_key_value_heads": 4, "vocab_size": 512}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """What one process measures. `mode` is the engine's: llama.cpp has only one."""

    engine: str
    type: str
    mode: str
    path: str
    context: int
    threads: int
    new: int


@dataclass(frozen=True)
class Figures:
    """What it found."""

    memory_mb: float
    prompt: float
    """Tokens a second."""
    speed: float
    """Tokens a second."""


# ------------------------------------------------------------------------------- in one process


def measure(case: Case) -> Figures:
    """Load, read the context, make tokens."""
    process, ids = psutil.Process(), [2 + k % 97 for k in range(case.context)]
    run = _llama if case.engine == "llama.cpp" else _ours
    prompt, new, before = run(case, ids)
    grown = process.memory_info().rss - before
    return Figures(grown / 1e6, case.context / prompt, case.new / new)


def _llama(case: Case, ids: list[int]) -> tuple[float, float, int]:
    import llama_cpp  # noqa: F401 - before memory is looked at

    from bitray.inference.engines import GGUFEngine

    before = psutil.Process().memory_info().rss
    engine = GGUFEngine(
        case.path, case.context + case.new, n_threads=case.threads, n_threads_batch=case.threads,
        use_mmap=False,
    )  # fmt: skip
    engine.llama.eval(ids[:8])  # the first call allocates
    engine.llama.reset()
    began = time.perf_counter()
    engine.llama.eval(ids)
    read = time.perf_counter()
    for token in range(case.new):
        engine.llama.eval([2 + token % 97])
    return read - began, time.perf_counter() - read, before


def _ours(case: Case, ids: list[int]) -> tuple[float, float, int]:
    import torch

    from bitray.inference.engines import GENERATORS
    from bitray.models import load_model
    from bitray.nn.frozen import freeze

    torch.set_num_threads(case.threads)
    before = psutil.Process().memory_info().rss
    model, generate = load_model(case.path).eval(), GENERATORS[case.mode]
    freeze(model)  # as the server does
    sampling = Sampling(temperature=0, max_new_tokens=case.new)
    with torch.no_grad():
        model(input_ids=torch.tensor([ids[:8]]), logits_to_keep=1)
        began = time.perf_counter()
        model(input_ids=torch.tensor([ids]), logits_to_keep=1)
        read = time.perf_counter()
    made = len(list(generate(model, ids, sampling, None)))
    assert made == case.new, f"{made} tokens of {case.new}"
    # the generator reads the prompt once more
    return read - began, time.perf_counter() - read - (read - began), before


# --------------------------------------------------------------------------------- all of them


def prepared(checkpoint: str | None, folder: Path, quick: bool) -> tuple[str, dict[str, Path]]:
    """The checkpoint's place, and its export in every type that can hold it."""
    import torch
    from gguf_models import make_tokenizer

    from bitray.export import GGUF_TYPES, can_export, write_gguf
    from bitray.models import build_model, load_model, load_tokenizer, save_model, to_bitnet
    from bitray.models.mask_token import add_mask_token
    from bitray.pipeline.folders import resolve_checkpoint

    if checkpoint is None:
        torch.manual_seed(0)
        config = {"model_type": "llama", "tie_word_embeddings": True, **(QUICK if quick else SHAPE)}
        checkpoint = str(folder / "made")
        made, speaks = to_bitnet(build_model(config)), make_tokenizer("gpt-2")
        add_mask_token(made, speaks)
        save_model(made, checkpoint, speaks)
    checkpoint = resolve_checkpoint(checkpoint)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    files = {}
    for kind in GGUF_TYPES:
        if reason := can_export(model, kind):
            print(f"not as {kind}: {reason}", file=sys.stderr)
            continue
        files[kind] = folder / f"{kind}.gguf"
        write_gguf(model, tokenizer, files[kind], kind)
    return checkpoint, files


def cases(
    checkpoint: str, files: dict[str, Path], contexts: Sequence[int], threads: Sequence[int],
    new: int,
) -> Iterator[Case]:  # fmt: skip
    from bitray.inference.engines import GENERATORS

    for context in contexts:
        for count in threads:
            for kind, path in files.items():
                if kind != "i2_s":
                    yield Case("llama.cpp", kind, "autoregressive", str(path), context, count, new)
            for mode in GENERATORS:
                yield Case("bitray", "fp32 masters", mode, checkpoint, context, count, new)


def in_a_process(case: Case) -> Figures | str:
    """The figures, or the last line of why there are none."""
    done = subprocess.run(
        [sys.executable, __file__, "--case", json.dumps(dataclasses.asdict(case))],
        capture_output=True, text=True, check=False,
        env={**os.environ, "OMP_NUM_THREADS": str(case.threads)},
    )  # fmt: skip
    if done.returncode:
        return (done.stderr.strip().splitlines() or ["no reason given"])[-1]
    return Figures(**json.loads(done.stdout.splitlines()[-1]))


def results(wanted: list[Case], sizes: dict[str, float], repeats: int) -> Iterator[dict[str, Any]]:
    """One row a case; medians of all turns."""
    found: dict[Case, list[Figures]] = {case: [] for case in wanted}
    failed: dict[Case, str] = {}
    for turn in range(repeats):
        for case in wanted:
            figures = in_a_process(case)
            print(f"turn {turn + 1}: {case.type} {case.mode} {case.context}", file=sys.stderr)
            if isinstance(figures, str):
                failed[case] = figures
            else:
                found[case].append(figures)
    for case in wanted:
        row = {**dataclasses.asdict(case), "size_mb": sizes.get(case.type)}
        del row["path"], row["new"]
        if case in failed:
            yield {**row, "failed": failed[case]}
            continue
        medians = {
            field.name: statistics.median(getattr(each, field.name) for each in found[case])
            for field in dataclasses.fields(Figures)
        }
        yield {**row, **medians}


def against_f16(rows: list[dict[str, Any]]) -> None:
    """Size and speed of every row as multiples of f16's, at the same context and threads."""
    reference = {(r["context"], r["threads"]): r for r in rows if r["type"] == "f16"}
    for row in rows:
        base = reference.get((row["context"], row["threads"]), {})
        for name in ("size_mb", "memory_mb", "prompt", "speed"):
            if row.get(name) and base.get(name):
                row[f"{name}_of_f16"] = row[name] / base[name]


HEADER = ("engine", "type", "mode", "context", "threads", "MB", "of f16", "memory MB", "prompt/s",
          "tokens/s", "of f16", "")  # fmt: skip


def shown(row: dict[str, Any]) -> tuple[str, ...]:
    """A row as cells."""

    def cell(name: str, layout: str) -> str:
        return format(row[name], layout) if row.get(name) is not None else ""

    return (
        row["engine"], row["type"], row["mode"], str(row["context"]), str(row["threads"]),
        cell("size_mb", ".1f"), cell("size_mb_of_f16", ".2f"), cell("memory_mb", ".0f"),
        cell("prompt", ".1f"), cell("speed", ".1f"), cell("speed_of_f16", ".2f"),
        row.get("failed", ""),
    )  # fmt: skip


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--checkpoint", help="a run, a stage, a checkpoint, a model folder")
    parser.add_argument("--contexts", type=int, nargs="+", default=[64, 512])
    parser.add_argument("--threads", type=int, nargs="+", default=sorted({1, os.cpu_count() or 1}))
    parser.add_argument("--new", type=int, default=64, help="tokens to make")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="whether it runs at all")
    parser.add_argument("--json", action="store_true", help="JSON instead of the table")
    parser.add_argument("--case", help=argparse.SUPPRESS)
    said = parser.parse_args()
    from bitray.settings import UserError

    try:
        if said.case:
            print(json.dumps(dataclasses.asdict(measure(Case(**json.loads(said.case))))))
            return 0
        return report(said)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def report(said: argparse.Namespace) -> int:
    """Measure and print; 1 if something did not run."""
    from bitray.inference.engines import require_llama_cpp
    from bitray.pipeline.report import Table

    require_llama_cpp()
    if said.quick:
        said.contexts, said.threads, said.new, said.repeats = [32], [1], 8, 1
    with tempfile.TemporaryDirectory(prefix="br") as folder:
        checkpoint, files = prepared(said.checkpoint, Path(folder), said.quick)
        stored = (file for file in Path(checkpoint).rglob("*") if file.is_file())
        sizes = {"fp32 masters": sum(file.stat().st_size for file in stored) / 1e6}
        sizes |= {kind: path.stat().st_size / 1e6 for kind, path in files.items()}
        wanted = list(cases(checkpoint, files, said.contexts, said.threads, said.new))
        rows = list(results(wanted, sizes, said.repeats))
    against_f16(rows)
    if "i2_s" in sizes:
        unread = {"engine": "bitnet.cpp", "type": "i2_s", "mode": "", "context": "", "threads": ""}
        ratio = sizes["i2_s"] / sizes["f16"]
        rows.append({**unread, "size_mb": sizes["i2_s"], "size_mb_of_f16": ratio,
                     "failed": "not run: llama.cpp does not read it"})  # fmt: skip
    if said.json:
        print(json.dumps(rows, indent=1))
    else:
        print(Table(HEADER, [shown(row) for row in rows]).text())
    return int(any("failed" in row and row["type"] != "i2_s" for row in rows))


if __name__ == "__main__":
    sys.exit(main())

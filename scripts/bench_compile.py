"""What compiling costs and gains: ten combinations of mode, full graph and checkpointing.

Each trains some steps of each stage in a process of its own, on random packed rows. Reported are
steps and tokens per second (of the median step after the first two, which compile), the seconds of
the first step, peak memory (of the device; on CPUs of the whole process) and the cosine of the
first step's gradients against eager. Modes that record CUDA graphs are skipped on CPUs. Judge
ratios within one run of this script only, on a machine that does nothing else.
"""

import argparse
import json
import statistics
import sys
from typing import Any, NamedTuple

import torch
from compare_runs import Found, configured, cosine, measured, table

from bitray.settings import UserError

EXAMPLES = """
examples:
  python scripts/bench_compile.py --stages stage2 --steps 8
  python scripts/bench_compile.py model=smollm2_135m pipeline=standard scaling=single_gpu --json
"""
UNTIMED = 2
CUDA_GRAPHS = ("reduce-overhead", "max-autotune")


class Combination(NamedTuple):
    """How the decoder blocks run; mode None: eager."""

    mode: str | None
    fullgraph: bool
    checkpointing: bool

    @property
    def name(self) -> str:
        """Short, for the table."""
        parts = [self.mode or "eager", "full graph" * self.fullgraph]
        return ", ".join(filter(None, [*parts, "checkpointing" * self.checkpointing]))

    def words(self) -> list[str]:
        """As overrides."""
        values: dict[str, Any] = {
            "activation_checkpointing": self.checkpointing,
            "torch_compile.enabled": self.mode is not None,
            "torch_compile.mode": self.mode or "default",
            "torch_compile.fullgraph": self.fullgraph,
        }
        return [f"training.{path}={json.dumps(value)}" for path, value in values.items()]


COMBINATIONS = (
    Combination(None, False, False),
    Combination(None, False, True),
    Combination("default", False, False),
    Combination("default", True, False),
    Combination("default", False, True),
    Combination("default", True, True),
    Combination("reduce-overhead", False, False),
    Combination("max-autotune", False, False),
    Combination("max-autotune-no-cudagraphs", False, False),
    Combination("max-autotune-no-cudagraphs", False, True),
)


def line(stage: str, combination: Combination, eager: Found, found: Found, rows: int) -> dict:
    """One row of the table; `rows`: tokens of a step."""
    second = statistics.median(found.seconds[UNTIMED:])
    like = min(cosine(eager.gradients[name], found.gradients[name]) for name in eager.gradients)
    return {
        "stage": stage,
        "combination": combination.name,
        "steps_per_second": 1 / second,
        "tokens_per_second": rows / second,
        "first_step_seconds": found.seconds[0],
        "peak_gb": found.peak / 1e9,
        "cosine": like,
    }


def bench(words: list[str], stage: str, steps: int) -> list[dict]:
    """All combinations of one stage; the first is eager."""
    lines, eager = [], None
    for combination in COMBINATIONS:
        config = configured([*words, *combination.words()], stage)
        if combination.mode in CUDA_GRAPHS and not config.scaling_of(stage).use_gpu:
            lines.append({"stage": stage, "combination": combination.name, "skipped": "needs CUDA"})
            continue
        settings = config.stages[stage]
        tokens = settings.rows_per_step * settings.max_seq_length
        try:
            found = measured(config, stage, steps + UNTIMED)
        except torch.multiprocessing.ProcessRaisedException as error:
            why = str(error).strip().splitlines()[-1]  # some modes fail with some models
            lines.append({"stage": stage, "combination": combination.name, "failed": why})
            continue
        eager = eager or found
        lines.append(line(stage, combination, eager, found, tokens))
        print(f"{stage}: {combination.name} done", file=sys.stderr, flush=True)
    return lines


def shown(line: dict) -> list[str]:
    """A row of the table as text."""
    head = [line["stage"], line["combination"]]
    if "steps_per_second" not in line:
        reason = line.get("skipped") or f"failed: {line['failed']}"
        return [*head, "-", "-", "-", "-", "-", reason[:60]]
    return [
        *head, f"{line['steps_per_second']:.3g}", f"{line['tokens_per_second']:.4g}",
        f"{line['first_step_seconds']:.3g}", f"{line['peak_gb']:.3g}", f"{line['cosine']:.7f}", "",
    ]  # fmt: skip


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("words", nargs="*", help="overrides of the configuration")
    parser.add_argument("--stages", nargs="+", default=["stage1_9", "stage2"])
    parser.add_argument("--steps", type=int, default=6, help="timed steps of each combination")
    parser.add_argument("--json", action="store_true")
    said = parser.parse_intermixed_args()
    try:
        lines = [each for stage in said.stages for each in bench(said.words, stage, said.steps)]
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    if said.json:
        print(json.dumps(lines))
    else:
        header = ("stage", "combination", "steps/s", "tokens/s", "first s", "peak GB", "cosine", "")
        print(table(header, [shown(each) for each in lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())

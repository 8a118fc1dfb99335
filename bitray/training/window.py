"""What is summed between two log lines, and what is told of it."""

import math
import time
from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from bitray.optim import Reports
from bitray.training.parallel import all_gather_objects, all_reduce_sums, world

if TYPE_CHECKING:
    from bitray.training.loop import Loop


@dataclass
class Window:
    """Sums since the last log line."""

    sums: dict[str, Any] = field(default_factory=lambda: defaultdict(float))
    """Of this worker; numbers, or scalars on its device."""
    counts: dict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Of all workers."""
    before: torch.Tensor | None = None
    """`Loop.source_sums` at its start."""
    started: float = field(default_factory=time.perf_counter)
    waited: float = 0.0
    own: float = 0.0
    """Seconds of this worker's work before it had to wait for others."""
    steps: int = 0
    updates: int = 0
    """Steps that were not skipped."""
    term_norms: dict[str, float] = field(default_factory=dict)
    """Gradient norm of each objective, weight included, where it was measured."""


def worker_metrics(window: Window) -> dict[str, float]:
    """Of this worker alone, over the window."""
    seconds = time.perf_counter() - window.started
    steps = max(window.steps, 1)
    return {
        "worker/own_seconds": window.own / steps,
        "worker/step_seconds": seconds / steps,
        "worker/data_wait": window.waited / seconds,
    }


def summary(loop: "Loop") -> dict[str, float]:
    """Token-weighted means over the window and over all workers."""
    window, settings = loop.window, loop.settings
    sums = _sum_over_workers({key: float(value) for key, value in window.sums.items()})
    by_source = loop.source_sums - (0 if window.before is None else window.before)
    tokens, nll, labels = all_reduce_sums(by_source).tolist()
    seconds = time.perf_counter() - window.started
    metrics, updates = _losses(window, sums), window.updates or math.nan
    for at, name in enumerate(loop.sources):
        metrics[f"mixture/share_{name}"] = tokens[at] / window.counts["tokens"]
        if labels[at]:
            metrics[f"mixture/loss_{name}"] = nll[at] / labels[at]
    metrics |= {f"train/grad_norm_{name}": norm for name, norm in window.term_norms.items()}
    for group in loop.optimizer.param_groups:
        metrics[f"schedule/lr_{group['name']}"] = group["lr"]
    if isinstance(loop.optimizer, Reports):
        metrics |= {f"train/{name}": value for name, value in loop.optimizer.report().items()}
    if loop.mfu_per_rate is not None:
        metrics["train/mfu"] = loop.mfu_per_rate * window.counts["tokens"] / seconds
    step, total = max(0, loop.position.schedule_step - 1), settings.total_steps
    if settings.saliency_curriculum.enabled:
        metrics["schedule/saliency_k"] = settings.saliency_curriculum.k(step, total)
    return metrics | {
        "schedule/strength": loop.position.strength,
        "train/grad_norm": sums.get("grad_norm", math.nan) / world()[1] / updates,
        "train/zclipped_steps": sums.get("zclipped", 0.0) / world()[1],
        "train/tokens": float(loop.position.tokens),
        "train/tokens_per_second": window.counts["tokens"] / seconds,
        "train/data_wait": window.waited / seconds,
        "train/step_seconds": seconds / window.steps,
        "train/skipped_steps": float(loop.position.skipped),
        "train/label_share": window.counts.get("continue_pretrain", math.nan)
        / max(window.counts["tokens"], 1.0),
        "train/padding": 1 - window.counts["tokens"]
        / (window.steps * settings.rows_per_step * settings.max_seq_length),
    }  # fmt: skip


def _losses(window: Window, sums: dict[str, float]) -> dict[str, float]:
    """Of every objective and of all together; NaN where no step was taken."""
    updates = window.updates or math.nan
    metrics: dict[str, float] = {"train/loss": 0.0 * updates}
    for name in (key[7:] for key in window.counts if key.startswith("weight/")):
        count = max(window.counts[name], 1.0)
        weight = window.counts[f"weight/{name}"]
        mean = sums.get(f"{name}/sum", 0.0) / count
        metrics["train/loss"] += weight * mean
        metrics[f"train/{name}_loss"] = mean
        metrics[f"schedule/{name}_weight"] = weight
        for key, value in sums.items():
            if key.startswith(f"{name}/") and not key.endswith("/sum"):
                metrics[f"train/{name}_{key.partition('/')[2]}"] = value / count
    if "dlm" in window.counts:
        metrics["train/dlm_num_masked"] = window.counts["dlm"] / updates
    return metrics


def _sum_over_workers(sums: dict[str, float]) -> dict[str, float]:
    """Sums by name; workers may know different names, an empty ticket none at all."""
    total: dict[str, float] = defaultdict(float)
    for part in all_gather_objects(sums):
        for key, value in part.items():
            total[key] += value
    return dict(total)

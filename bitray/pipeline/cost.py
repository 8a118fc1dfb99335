"""What a run will take, and what it took: time, money, memory and disk, stage by stage."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from pydantic import Field

from bitray.settings import Settings, nearest

if TYPE_CHECKING:
    import torch

ESTIMATE = "estimate.json"
"""What was expected, in the run's folder: the report compares it with what happened."""


class Cost(Settings):
    """Prices and speeds that an estimate rests on. Edit them: prices change by the week."""

    gpu: str | None = None
    """Kind of GPU, a key of `prices`; None: the one that `gpu=` names."""
    provider: str | None = None
    """Whose price; None: all of them are shown."""
    prices: dict[str, dict[str, float]] = {
        "a100_80gb": {"runpod": 1.19, "lambda": 1.89, "gcp": 3.80},
        "h100_80gb": {"on_demand": 2.89},
    }
    """Dollars for an hour of one GPU, by kind and provider."""
    peak_tflops: float | None = Field(default=None, gt=0)
    """Of one worker's device, dense 16-bit; None: by the table of known GPUs, CPUs have none."""
    mfu: float = Field(default=0.3, gt=0, le=1)
    """Share of the peak that is taken to be reached where nothing was measured."""

    def peak_flops(self, device: "torch.device") -> float | None:
        """FLOP/s of a worker's device, if they are known."""
        import torch

        from bitray.training.flops import peak_flops

        if self.peak_tflops is not None:
            return self.peak_tflops * 1e12
        return peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None

    def planned_flops(self, gpu: str | None) -> float | None:
        """FLOP/s of a kind of GPU that need not be here."""
        from bitray.training.flops import peak_flops

        if self.peak_tflops is not None:
            return self.peak_tflops * 1e12
        return peak_flops(gpu) if gpu else None

    def problem(self, gpu: str | None) -> str | None:
        """Why the price that was asked for is not known."""
        if self.gpu is not None and self.gpu not in self.prices:
            near = nearest(self.gpu, self.prices)
            return f"cost.gpu: there is no price of {self.gpu}{near}; give cost.prices.{self.gpu}"
        known = self.prices.get(self.gpu or gpu or "", {})
        if self.provider is not None and self.provider not in known:
            near = nearest(self.provider, known)
            return f"cost.provider: {self.provider} has no price for {self.gpu or gpu}{near}"
        return None

    def rates(self, gpu: str | None) -> dict[str, float]:
        """Dollars an hour by provider."""
        known = self.prices.get(self.gpu or gpu or "", {})
        return {who: price for who, price in known.items() if self.provider in (None, who)}


@dataclass(frozen=True)
class Expected:
    """A stage, before it runs."""

    tokens: int
    workers: int
    memory_gb: float
    """Of one worker."""
    tokens_per_second: float | None
    """Of all workers; None: nobody knows."""
    how: str
    """Where the rate comes from."""
    checkpoint_gb: float
    """One checkpoint."""
    checkpoints: int
    """How many of them lie there at most."""

    @property
    def hours(self) -> float | None:
        """Of training alone: start-up and side work come on top."""
        if not self.tokens:
            return 0.0
        return self.tokens / self.tokens_per_second / 3600 if self.tokens_per_second else None

    @property
    def worker_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.workers


def duration(hours: float | None) -> str:
    """For people."""
    if hours is None:
        return "unknown"
    return f"{hours:.1f} h" if hours >= 1 else f"{hours * 60:.1f} min"


def money(worker_hours: float, rates: Mapping[str, float]) -> str:
    """For people: dollars by provider."""
    return ", ".join(f"{who} ${worker_hours * rate:,.2f}" for who, rate in rates.items())


def dump(stages: Mapping[str, Expected]) -> dict[str, Any]:
    """As JSON."""
    return {name: asdict(each) for name, each in stages.items()}


def load(held: Mapping[str, Mapping[str, Any]]) -> dict[str, Expected]:
    """From JSON."""
    return {name: Expected(**each) for name, each in held.items()}


def comparison(
    expected: Mapping[str, Expected], records: Sequence[Mapping[str, Any]]
) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Header and rows of a table: what was expected of each stage, and what its metrics say."""
    header: tuple[str, ...] = ("stage", "tokens/s", "expected", "time", "expected")
    header += ("memory/worker", "expected")
    rows: list[tuple[str, ...]] = []
    for name, each in expected.items():
        mine = [r for r in records if r["stage"] == name]
        windows = [r for r in mine if "train/tokens_per_second" in r]
        if not windows:
            continue
        tokens, seconds = _totals(windows)
        peaks = [r["train/peak_memory_gb"] for r in mine if "train/peak_memory_gb" in r]
        rate = each.tokens_per_second
        rows.append((
            name,
            f"{tokens / seconds:,.0f}" if seconds else "-",
            "unknown" if rate is None else f"{rate:,.0f} ({each.how})",
            duration(seconds / 3600),
            duration(each.hours),
            f"{max(peaks) * 2**30 / 1e9:.2g} GB" if peaks else "-",
            f"{each.memory_gb:.2g} GB",
        ))  # fmt: skip
    return header, rows


def _totals(windows: Sequence[Mapping[str, Any]]) -> tuple[float, float]:
    """Tokens and seconds of all windows; a resumed stage's windows each have their own rate."""
    before, tokens, seconds = 0.0, 0.0, 0.0
    for record in windows:
        added = record["train/tokens"] - before
        before = record["train/tokens"]
        tokens += added
        seconds += added / record["train/tokens_per_second"]
    return tokens, seconds

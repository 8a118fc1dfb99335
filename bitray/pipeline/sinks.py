"""Which sinks a run writes to, and the one that needs Ray."""

import os
import threading
from collections.abc import Mapping

from ray.util import metrics as ray_metrics

from bitray import storage
from bitray.pipeline.config import Config
from bitray.pipeline.console import Say
from bitray.pipeline.report import influence_matrix
from bitray.training.metrics import Console, JsonLines, Sink, TensorBoard, WeightsAndBiases
from bitray.training.scores import METHODS

TAGGED = (
    ("mixture/share_", "", "source"), ("mixture/loss_", "", "source"), ("eval/", "_loss", "domain"),
    ("mixture/epoch_", "", "source"), ("mixture/weight_", "", "source"),
    ("influence/weight_", "", "source"), ("goodput/share_", "", "cause"),
    ("schedule/lr_", "", "group"),
)  # fmt: skip
"""What stands before and after a name within a metric's own, and the tag that takes the name."""
Tagged = tuple[str, dict[str, str]]
"""Name of a gauge, and its tags beside those that all have."""


AGAIN_S = 5.0
"""Ray exports what was set since its last export, every 10 s, and forgets a gauge after 20 s."""


class RayMetrics:
    """Gauges for the Ray dashboard and Prometheus: `bitray_train_loss{run, stage}` and so on; what
    is told by source is one gauge with a tag, `bitray_mixture_share{run, stage, source}`. `own`:
    tags of a worker whose own metrics they are. A thread sets them again until the stage is closed,
    so that they stay where no step ends, and then go."""

    def __init__(self, run: str, **own: str) -> None:
        self.run, self.own = run, own
        self.gauges: dict[str, ray_metrics.Gauge] = {}
        self.last: dict[tuple[str, ...], tuple[ray_metrics.Gauge, float, dict[str, str]]] = {}
        self.closed = threading.Event()
        threading.Thread(target=self._again, name="gauges", daemon=True).start()

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        step_itself = {} if self.own else {"train/step": float(step)}
        pairs = _by_probe_and_source(metrics)
        for name, value in {**metrics, **step_itself}.items():
            named, apart = pairs.get(name) or _by_name(name)
            tags = {"run": self.run, "stage": stage, **self.own, **apart}
            gauge = self._gauge(named, tuple(tags))
            gauge.set(value, tags)
            self.last[named, *tags.values()] = gauge, value, tags

    def _again(self) -> None:
        while not self.closed.wait(AGAIN_S):
            for gauge, value, tags in list(self.last.values()):
                gauge.set(value, tags)

    def _gauge(self, name: str, tags: tuple[str, ...]) -> ray_metrics.Gauge:
        if name not in self.gauges:
            gauge = "bitray_" + "".join(c if c.isalnum() else "_" for c in name)
            self.gauges[name] = ray_metrics.Gauge(gauge, name, tag_keys=tags)
        return self.gauges[name]

    def flush(self) -> None: ...

    def close(self) -> None:
        self.closed.set()


def _by_name(name: str) -> Tagged:
    for before, after, tag in TAGGED:
        if name.startswith(before) and name.endswith(after):
            own = name.removeprefix(before).removesuffix(after)
            return (before + after).strip("_").replace("/_", "/"), {tag: own}
    return name, {}


def _by_probe_and_source(metrics: Mapping[str, float]) -> dict[str, Tagged]:
    """Of the scores of a decision."""
    return {
        f"influence/{kind}_{probe}_{source}": (
            f"influence/{kind}", {"probe": probe, "source": source}
        )
        for kind in ("score", *METHODS)
        for probe, row in influence_matrix(metrics, kind).items()
        for source in row
    }  # fmt: skip


def sinks_of(config: Config, stage: str, step: int, run_id: str, say: Say) -> list[Sink]:
    """All sinks of a stage that stands at `step`; rank 0 calls it."""
    run_dir, name = config.run_dir, run_name(config)
    sinks: list[Sink] = [
        JsonLines(storage.join(run_dir, "metrics.jsonl"), stage, step),
        RayMetrics(name),
    ]
    if config.logging.tensorboard:
        sinks.append(TensorBoard(storage.join(run_dir, "tensorboard"), stage, step))
    if wandb_wanted(config):
        sinks.append(_wandb(config, name, run_id))
    if step < (total := config.stages[stage].total_steps):
        sinks.append(Console(total, say))
    return sinks


def _wandb(config: Config, name: str, run_id: str) -> WeightsAndBiases:
    said, values = config.logging.wandb, config.model_dump(mode="json")
    trained = tuple(name for name, stage in config.stages.items() if stage.total_steps)
    tags = trained if said.tags is None else said.tags
    where = said.project, name, run_id, config.run_dir
    return WeightsAndBiases(*where, values, group=said.group, tags=tags)


def run_name(config: Config) -> str:
    """What a run is called outside of its folder."""
    return config.experiment or f"bitray_{config.model.name}"


def wandb_wanted(config: Config) -> bool:
    """Asked for, or not spoken of while a key is there."""
    enabled = config.logging.wandb.enabled
    return bool(os.environ.get("WANDB_API_KEY")) if enabled is None else enabled

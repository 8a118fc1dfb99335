"""Which sinks a run writes to, and the one that needs Ray."""

import os
from collections.abc import Mapping

from ray.util import metrics as ray_metrics

from bitray import storage
from bitray.pipeline.config import Config
from bitray.pipeline.console import Say
from bitray.training.metrics import Console, JsonLines, Sink, TensorBoard, WeightsAndBiases

TAGGED = (
    ("mixture/share_", "", "source"), ("mixture/loss_", "", "source"), ("eval/", "_loss", "domain"),
    ("mixture/epoch_", "", "source"), ("influence/weight_", "", "source"),
    ("goodput/share_", "", "cause"), ("schedule/lr_", "", "group"),
)  # fmt: skip
"""What stands before and after a name within a metric's own, and the tag that takes the name."""


class RayMetrics:
    """Gauges for the Ray dashboard and Prometheus: `bitray_train_loss{run, stage}` and so on; what
    is told by source is one gauge with a tag, `bitray_mixture_share{run, stage, source}`. `own`:
    tags of a worker whose own metrics they are."""

    def __init__(self, run: str, **own: str) -> None:
        self.run, self.own = run, own
        self.gauges: dict[str, ray_metrics.Gauge] = {}

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        step_itself = {} if self.own else {"train/step": float(step)}
        for name, value in {**metrics, **step_itself}.items():
            tags = {"run": self.run, "stage": stage, **self.own}
            for before, after, tag in TAGGED:
                if name.startswith(before) and name.endswith(after):
                    tags[tag] = name.removeprefix(before).removesuffix(after)
                    name = (before + after).strip("_").replace("/_", "/")  # noqa: PLW2901
            self._gauge(name, tuple(tags)).set(value, tags)

    def _gauge(self, name: str, tags: tuple[str, ...]) -> ray_metrics.Gauge:
        if name not in self.gauges:
            gauge = "bitray_" + "".join(c if c.isalnum() else "_" for c in name)
            self.gauges[name] = ray_metrics.Gauge(gauge, name, tag_keys=tags)
        return self.gauges[name]

    def flush(self) -> None: ...
    def close(self) -> None: ...


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

"""A trial: a run of the real pipeline with a sample of the space, told to Tune as it goes."""

import math
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from ray import tune

from bitray import lease, storage
from bitray.data.manifest import digest
from bitray.pipeline.cli import causes
from bitray.pipeline.config import Config
from bitray.pipeline.evaluations import CONVERTED, EVALUATIONS, read_evaluations
from bitray.pipeline.material import pin, pinned
from bitray.pipeline.report import read_metrics
from bitray.pipeline.run import run
from bitray.settings import Passing, UserError
from bitray.training.loop import mean_loss
from bitray.tuning.stages import lengths, trained

POLL_SECONDS = 0.5
MEMORY = "out of memory"
PATIENCE_S = 3 * lease.STALE_S
"""How long a trial that is tried again waits for the lease of its run."""


def sampled(config: Config, overrides: Mapping[str, Any]) -> Config | None:
    """A run with a sample; None where it refuses settings together that are each legal, so that no
    such trial ever began."""
    try:
        return config.override(overrides)
    except UserError:
        return None


def trial_config(config: Config, base: str, overrides: Mapping[str, Any]) -> Config:
    """The configuration of a trial: in a folder of its own beside `base`, named by its sample, so
    that the same sample finds what it has done before; stages that none varies are those of `base`.
    For W&B the sweep is a group."""
    folder, _, name = trial_folder(base, overrides).rpartition("/")
    place = {
        "output_dir": folder,
        "experiment": name,
        "logging.wandb.group": base.split("/")[-2],
        "logging.wandb.tags": trained(config),
        **{f"stages.{n}.shared_run": base for n in config.stages if n not in trained(config)},
    }
    return config.override({**overrides, **place})


def trial_name(overrides: Mapping[str, Any]) -> str:
    """Of a trial's folder: a hash of its sample."""
    return digest(dict(overrides))[:12]


def trial_folder(base: str, overrides: Mapping[str, Any]) -> str:
    """Where a trial writes."""
    return storage.join(base.rpartition("/")[0], "trials", trial_name(overrides))


def trial(sample: dict[str, Any], config: Config, base: str) -> None:
    """What Tune runs. `base` is the run that holds what all trials have in common.

    A run that diverges, does not fit in memory or refuses its settings is reported as `abandoned`,
    for it would do so again; any other failure is raised, and Tune tries again where the run stood.
    """
    last: dict[str, Any] = {"progress": 0.0, "tokens": 0}
    try:
        config = trial_config(config, base, sample)
    except UserError as error:
        _abandon(last, error)
        return
    share(config, base)
    errors: list[BaseException] = []
    thread = threading.Thread(target=_run, args=(config, errors), name="run", daemon=True)
    thread.start()
    for told in follow(config, thread):
        if not math.isfinite(told["loss"]):
            _abandon(last, "the held-out loss is not finite")
            return
        last = told
        if told["progress"] < 1:
            tune.report(told)
    thread.join()
    if errors:
        reason = _hopeless(errors[0])
        if reason is None:
            raise errors[0]
        _abandon(last, reason)
        return
    tune.report(last)


def _abandon(last: Mapping[str, Any], reason: object) -> None:
    told = str(reason).partition("\n")[0]
    tune.report({**last, "loss": math.nan, "abandoned": told})


def clean(base: str, overrides: Mapping[str, Any]) -> None:
    """Delete a trial's checkpoints; what trials have in common lies elsewhere, and stays."""
    folder = trial_folder(base, overrides)
    for stage in storage.list_dirs(folder) if storage.exists(folder) else ():
        if stage.endswith("_checkpoint"):
            storage.remove(stage)


def _run(config: Config, errors: list[BaseException]) -> None:
    """Run it, once a driver that was lost with its node no longer counts as the run's writer."""
    patience = time.monotonic() + PATIENCE_S
    while True:
        try:
            run(config)
        except lease.Held as error:
            if time.monotonic() > patience:
                errors.append(error)
                return
            time.sleep(lease.BEAT_S)
        except BaseException as error:
            errors.append(error)
            return
        else:
            return


def _hopeless(error: BaseException) -> BaseException | None:
    """Why the same settings would fail again; None if they may not."""
    for each in causes(error):
        if MEMORY in str(each).lower():
            return each
        if isinstance(each, UserError):
            return None if isinstance(each, Passing) else each
    return None


def share(config: Config, base: str) -> None:
    """Tell the folder of a trial what became of the stages that all have in common, and with which
    inputs they began."""
    pin(config.run_dir, pinned(base))
    evaluations = storage.join(config.run_dir, EVALUATIONS)
    if not storage.exists(evaluations):
        known = read_evaluations(base).items()
        storage.write_json(evaluations, {k: v for k, v in known if k not in trained(config)})
    for stage in config.stages:
        here, there = (storage.join(d, "mixture", f"{stage}.json") for d in (config.run_dir, base))
        if stage not in trained(config) and not storage.exists(here) and storage.exists(there):
            storage.write_json(here, storage.read_json(there))  # where the next stage's rows begin


def follow(config: Config, thread: threading.Thread) -> Iterator[dict[str, Any]]:
    """Held-out evaluations of a run while it goes on, as results for Tune."""
    seen = 0
    while True:
        alive = thread.is_alive()
        found = evaluated(config, seen)
        yield from found
        seen += len(found)
        if not alive:
            return
        thread.join(POLL_SECONDS)


def history(config: Config, base: str, overrides: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Outcomes at the evaluations of a trial of a sweep."""
    if sampled(config, overrides) is None:
        return []
    return evaluated(trial_config(config, base, overrides))


def evaluated(config: Config, seen: int = 0) -> list[dict[str, Any]]:
    """Outcomes at the evaluations of a run so far, those after the first `seen` ones."""
    found, stages = read_metrics(config.run_dir), trained(config)
    at = [n for n, each in enumerate(found) if each["stage"] in stages and _losses(each)]
    return [outcome(config, found[: n + 1]) for n in at[seen:]]


def outcome(config: Config, found: list[dict[str, Any]]) -> dict[str, Any]:
    """All of `METRICS` at the last of a run's records, which is an evaluation."""
    last, tokens, steps = found[-1], 0, 0
    total = lengths(config)
    for name, most in total.items():
        stage = config.stages[name]
        done = last["step"] if name == last["stage"] else stage.total_steps
        steps += done
        tokens += most * done // stage.total_steps
        if name == last["stage"]:
            break
    peak = max(each["train/peak_memory_gb"] for each in found if _losses(each))
    loss, seconds = mean_loss(_losses(last)), last["train/seconds"]
    drop, rate = untrained_loss(config) - loss, tokens / seconds
    return {
        "loss": loss,
        "loss_drop": drop,
        "tokens": tokens,
        "steps": steps,
        "seconds": seconds,
        "tokens_per_second": rate,
        "peak_memory_gb": peak,
        "tokens_per_second_per_gb": rate / peak,
        "loss_drop_per_second_per_gb": drop / seconds / peak,
        "progress": tokens / sum(total.values()),
    }


def untrained_loss(config: Config) -> float:
    """Held-out loss of the model made ternary without any training."""
    known = read_evaluations(config.run_dir)
    converted = [name for name, stage in config.stages.items() if stage.convert_only]
    return mean_loss(known[next((name for name in converted if name in known), CONVERTED)])


def _losses(record: Mapping[str, Any]) -> dict[str, float]:
    return {k: float(v) for k, v in record.items() if k.startswith("eval/")}

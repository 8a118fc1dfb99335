"""A sweep: what trials have in common once, then trials beside each other, then the report.

`searcher.json` in the sweep's folder is its only memory: the same command goes on from there, and a
larger `num_trials` adds to it.
"""

import logging
import math
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler

from bitray import storage
from bitray.pipeline.config import Config
from bitray.pipeline.fit import reserved_cpus
from bitray.pipeline.material import prepared_root
from bitray.pipeline.plan import plan
from bitray.pipeline.run import located, run
from bitray.pipeline.session import ray_session
from bitray.settings import UserError
from bitray.tuning.report import write_report
from bitray.tuning.searcher import AxSearcher
from bitray.tuning.space import SearchSpace
from bitray.tuning.trial import clean, lengths, trained, trial, trial_config

RETRIES = 2
"""Of a trial that fails for no fault of its settings; it goes on where it stood."""


def sweep(space: SearchSpace, name: str) -> str:
    """Try all points of a sweep that were not tried yet. Returns its summary."""
    config = located(space.config())
    folder = storage.join(config.output_dir, config.experiment or name)
    if storage.is_remote(folder):
        raise UserError(f"output_dir: {folder} is remote; trials link what they share, locally")
    searcher = AxSearcher(space, file=storage.join(folder, "searcher.json"))
    searcher.hand_out_again()
    left = space.num_trials - len({each.index for each in searcher.ended()})
    with ray_session():
        if left > 0:
            base = common(config, folder)
            _tuner(searcher, config, base, left).fit()
            for each in searcher.ended():  # also of those that were stopped
                clean(trial_config(config, base, each.overrides))
        return write_report(folder, space, config, searcher)


def analyze(space: SearchSpace, folder: str) -> str:
    """Write the report of a sweep again; no trials."""
    file = storage.join(folder, "searcher.json")
    if not storage.exists(file):
        raise UserError(f"--analyze-only {folder}: there is no sweep; {file} is missing")
    searcher = AxSearcher(space, ahead=0, file=file)
    return write_report(folder, space, located(space.config()), searcher)


def outline(space: SearchSpace) -> str:
    """What a sweep would do, for `--dry-run`."""
    config = space.config()
    tokens = sum(lengths(config).values())
    lines = [
        f"{space.num_trials} trials, {space.sobol_trials} of them spread evenly, of up to "
        f"{tokens:,} tokens each ({tokens * space.num_trials:,} in all)",
        *(f"  {path}: {each.kind} {_shown(each)}" for path, each in space.parameters.items()),
    ]
    return "\n".join([*lines, "", str(plan(config))])


def common(config: Config, folder: str) -> str:
    """Run the stages that trials do not vary, with all data prepared; the folder of that run."""
    first = trained(config)[0]
    names = list(config.stages)
    before = names[: names.index(first)]
    steps = {f"stages.{name}.max_steps": 0 for name in names if name not in before}
    place = {
        "output_dir": folder,
        "experiment": "common",
        "data.prepared_dir": prepared_root(config),
    }
    base = config.override({**place, **steps})
    if before:
        run(base)
    return base.run_dir


def _tuner(searcher: AxSearcher, config: Config, base: str, trials: int) -> tune.Tuner:
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    total = sum(lengths(config).values())
    space = searcher.space
    how = space.scheduler
    scheduler: Any = FIFOScheduler()
    if how.type == "asha":
        scheduler = AsyncHyperBandScheduler(
            time_attr="tokens",
            metric="loss",
            mode="min",
            max_t=total,
            grace_period=max(1, math.floor(how.grace * total)),
            reduction_factor=how.reduction_factor,
        )
    shared = config.override({"data.prepared_dir": prepared_root(config)})
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, config=shared, base=base), {"CPU": 0.01}),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler,
            num_samples=trials,
            max_concurrent_trials=space.max_concurrent or room(config),
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=base.rpartition("/")[0],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            verbose=1,
        ),
    )


def room(config: Config) -> int:
    """Trials that the cluster holds beside each other; `UserError` if it holds none."""
    there = ray.cluster_resources()
    found = []
    for name in trained(config):
        how = config.scaling_of(name)
        found.append(there.get("CPU", 0) / reserved_cpus(how))
        if how.use_gpu:
            found.append(there.get("GPU", 0) / how.most)
    if min(found) < 1:
        raise UserError("scaling: the cluster does not hold the workers of a single trial")
    return math.floor(min(found))


def _shown(parameter: Any) -> str:
    said = getattr(parameter, parameter.kind)
    return f"{list(said) if isinstance(said, tuple) else said}"

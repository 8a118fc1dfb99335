"""A sweep: what trials have in common once, then trials beside each other, then the report.

`searcher.json` in the sweep's folder is its only memory: the same command goes on from there, and a
larger `num_trials` adds to it.
"""

import json
import logging
import math
import os
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import partial
from types import SimpleNamespace
from typing import Any

import ray
from ray import tune
from ray.tune.schedulers import AsyncHyperBandScheduler, FIFOScheduler, TrialScheduler

from bitray import lease, storage
from bitray.pipeline.autoscaler import autoscales
from bitray.pipeline.config import Config
from bitray.pipeline.folders import lasting, located
from bitray.pipeline.groups import Scaling
from bitray.pipeline.identity import differences, mathematical_settings
from bitray.pipeline.interrupt import interruptible
from bitray.pipeline.material import at_commit, prepared_root
from bitray.pipeline.plan import needed, plan
from bitray.pipeline.run import prepare_only, run
from bitray.pipeline.session import ray_session
from bitray.settings import UserError
from bitray.tuning.cost import Clock
from bitray.tuning.live import Watch
from bitray.tuning.report import ATTEMPTS, COMMON, write_report
from bitray.tuning.searcher import AxSearcher, Found
from bitray.tuning.space import SearchSpace
from bitray.tuning.stages import before, lengths, trained
from bitray.tuning.trial import clean, history, sampled, trial

SPACE = "space.yaml"
"""Of a sweep's folder: what it searches, with the words of the command line."""
ESSENCE = {"parameters", "constraints", "objectives", "outcome_constraints"}
"""What makes a space another one; of the rest more may be asked later."""
DRIVER = {"memory": 2.0**20}
"""What the process of a trial asks for: it only waits, and all CPUs are for workers and readers."""
RETRIES = 2
"""Of a trial that fails for no fault of its settings; it goes on where it stood."""


def sweep(space: SearchSpace, name: str) -> str:
    """Try all points of a sweep that were not tried yet. Returns its summary."""
    config = at_commit(located(space.config()))
    folder = storage.join(config.output_dir, config.experiment or name)
    with lease.held(folder):
        claim(space, config, folder)
        searcher = AxSearcher(space, file=storage.join(folder, "searcher.json"))
        searcher.hand_out_again()
        known = searcher.ended()
        storage.write_text(storage.join(folder, SPACE), space.dump())
        if space.num_trials > len(known):
            with ray_session():
                _try(searcher, config, folder, known)
        for each in searcher.ended() if not space.keep_checkpoints else ():
            clean(storage.join(folder, COMMON), each.overrides)
        return write_report(folder, space, config, searcher)


def _try(searcher: AxSearcher, config: Config, folder: str, known: Sequence[Found]) -> None:
    """The trials beside those that are known."""
    base, left = common(config, folder), searcher.space.num_trials - len(known)
    clock, watch = Clock(storage.join(folder, ATTEMPTS)), Watch(searcher, known)
    try:
        _search(_tuner(searcher, config, base, left, [clock, watch]))
    finally:
        watch.close()


def claim(space: SearchSpace, config: Config, folder: str) -> None:
    """Note in the folder which sweep it holds; `UserError` if that is another one, whose trials do
    not compare with these."""
    said = space.model_dump(mode="json", include=ESSENCE)
    here = json.loads(json.dumps({"space": said, "run": mathematical_settings(config)}))
    uri = storage.join(folder, "sweep.json")
    changed = differences(storage.read_json(uri), here) if storage.exists(uri) else {}
    if changed:
        path, (old, new) = next(iter(changed.items()))
        more = f", and {len(changed) - 1} more differences" if len(changed) > 1 else ""
        raise UserError(
            f"{folder} holds another sweep: {path} is {old!r} there and {new!r} here{more}; take "
            "another experiment=NAME"
        )
    storage.write_json(uri, here)


def analyze(folder: str) -> str:
    """Write the report of a sweep again; no trials."""
    folder = lasting(folder)
    file, spoken = storage.join(folder, "searcher.json"), storage.join(folder, SPACE)
    for each in (file, spoken):
        if not storage.exists(each):
            raise UserError(f"--analyze-only {folder}: there is no sweep; {each} is missing")
    space = SearchSpace.load_text(storage.read_text(spoken), spoken)
    searcher = AxSearcher(space, ahead=0, file=file)
    return write_report(folder, space, located(space.config()), searcher)


def outline(space: SearchSpace) -> str:
    """What a sweep would do, for `--dry-run`."""
    from bitray.tuning.experiment import client_of

    client_of(space)  # Ax has to take it
    config = space.config()
    tokens = longest(space, config)
    lines = [
        f"{space.num_trials} trials, {space.sobol_trials} of them spread evenly, of up to "
        f"{tokens:,} tokens each ({tokens * space.num_trials:,} in all)",
        *(f"  {path}: {each.kind} {_shown(each)}" for path, each in space.parameters.items()),
    ]
    return "\n".join([*lines, "", str(plan(config))])


def common(config: Config, folder: str) -> str:
    """Run the stages that trials do not vary, with all data prepared; the folder of that run.
    `KeyboardInterrupt` if it was stopped."""
    shared = before(config)
    steps = {f"stages.{name}.max_steps": 0 for name in config.stages if name not in shared}
    place = {
        "output_dir": folder,
        "experiment": COMMON,
        "data.prepared_dir": prepared_root(config),
    }
    base = config.override({**place, **steps})
    if not shared:
        prepare_only(base)
    elif run(base).stopped:
        raise KeyboardInterrupt
    return base.run_dir


def _search(tuner: tune.Tuner) -> None:
    """All trials; `KeyboardInterrupt` once Tune has put those away that ran at an interrupt."""
    os.environ["TUNE_DISABLE_SIGINT_HANDLER"] = "1"  # it would swallow the interrupt
    signal.signal(signal.SIGUSR1, signal.default_int_handler)  # until Tune listens to it
    stop = partial(signal.raise_signal, signal.SIGUSR1)
    with interruptible("stopping; the same command continues the sweep", stop) as asked:
        tuner.fit()
    if asked():
        raise KeyboardInterrupt


def _tuner(
    searcher: AxSearcher, config: Config, base: str, trials: int, callbacks: list[tune.Callback]
) -> tune.Tuner:
    logging.getLogger("ray.tune").setLevel(logging.ERROR)
    space = searcher.space
    shared = config.override({"data.prepared_dir": prepared_root(config)})
    return tune.Tuner(
        tune.with_resources(tune.with_parameters(trial, config=shared, base=base), DRIVER),
        tune_config=tune.TuneConfig(
            search_alg=searcher,
            scheduler=scheduler_of(searcher, config, base),
            num_samples=trials,
            max_concurrent_trials=concurrent(space, config),
            reuse_actors=False,  # the run of a trial that was stopped ends with its process
        ),
        run_config=tune.RunConfig(
            name="tune",
            storage_path=base.rpartition("/")[0],
            failure_config=tune.FailureConfig(max_failures=RETRIES),
            callbacks=[*callbacks, Cleaner(base, space.keep_checkpoints)],
            verbose=0,
        ),
    )


class Cleaner(tune.Callback):
    """Deletes checkpoints of trials that ended. Workers of one that was stopped may still write, so
    those that ended before are looked at again, by the sweep at its end too."""

    def __init__(self, base: str, keep: bool) -> None:
        self.base, self.keep = base, keep
        self.ended: list[dict[str, Any]] = []

    def on_trial_complete(self, iteration: int, trials: list[Any], trial: Any, **_: Any) -> None:
        self.ended.append(trial.config)
        for sample in self.ended if not self.keep else ():
            with suppress(OSError):  # a folder that grows while it is removed
                clean(self.base, sample)


def scheduler_of(searcher: AxSearcher, config: Config, base: str) -> TrialScheduler:
    """Early stopping by what all trials have told, those of a driver that is gone included."""
    how = searcher.space.scheduler
    if how.type == "none":
        return FIFOScheduler()
    total = longest(searcher.space, config)
    asha: Any = AsyncHyperBandScheduler(
        time_attr="tokens",
        metric="loss",
        mode="min",
        max_t=total,
        grace_period=max(1, math.floor(how.grace * total)),
        reduction_factor=how.reduction_factor,
    )
    for each in searcher.ended():
        gone = SimpleNamespace(trial_id=f"ended-{each.index}")
        asha.on_trial_add(None, gone)
        for told in history(config, base, each.overrides):
            if math.isfinite(told["loss"]):
                asha.on_trial_result(None, gone, told)
    return asha


def longest(space: SearchSpace, config: Config) -> int:
    """Tokens of the longest trial: they grow, or not, with each setting by itself."""

    def tokens(said: Mapping[str, Any]) -> int:
        run = sampled(config, said)
        return -1 if run is None else sum(lengths(run).values())

    said: dict[str, Any] = {}
    for path, parameter in space.parents_first():
        found = [
            {**said, **state, path: value}
            for state in space.states(path)
            for value in parameter.tried()
        ]
        if parameter.condition or max(map(tokens, found), default=-1) < 0:
            found.append(said)  # as it is without
        said = max(found, key=tokens)
    return tokens(said)


def concurrent(space: SearchSpace, config: Config) -> int:
    """Trials beside each other: as many as the nodes hold, or fewer if the space says so; where an
    autoscaler brings nodes, which says nothing of how many, as many as the space says.
    `UserError` if the nodes hold none and no others will come."""
    wanted, most = space.max_concurrent, room(config)
    if autoscales():
        if wanted is None:
            said = "an autoscaler may bring nodes; max_concurrent says for how many trials"
            print(f"note: {said}, for now {max(1, most)}")
        return wanted or max(1, most)
    if most < 1:
        raise UserError("scaling: the cluster does not hold the workers of a single trial")
    if wanted and wanted > most:
        print(f"note: the cluster holds {most} trials at a time, not {wanted}")
    return min(wanted or most, most)


def room(config: Config) -> int:
    """Trials that the nodes hold beside each other."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cpus, gpus = (sum(node.get(kind, 0.0) for node in nodes) for kind in ("CPU", "GPU"))
    found = []
    for name in trained(config):
        how, (cpus_of_one, gpus_of_one) = config.scaling_of(name), needed(config, name)
        found.append(cpus / cpus_of_one)
        found.append(sum(_workers(node, how) for node in nodes) / how.fewest)
        if gpus_of_one:
            found.append(gpus / gpus_of_one)
    return math.floor(min(found))


def _workers(node: dict[str, float], how: Scaling) -> int:
    """How many workers a node takes, each of them whole."""
    fitting = node.get("CPU", 0.0) / how.cpus_per_worker
    if how.use_gpu:
        fitting = min(fitting, node.get("GPU", 0.0) / how.gpus_per_worker)
    return math.floor(fitting + 1e-9)


def _shown(parameter: Any) -> str:
    said = getattr(parameter, parameter.kind)
    return f"{list(said) if isinstance(said, tuple) else said}"

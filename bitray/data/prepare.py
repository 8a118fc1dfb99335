"""Preparing data on a Ray cluster: units of input become shards of packed rows, then a manifest.

The same settings and inputs give the same bytes on any number of workers. A second run finds the
manifest and does nothing; an interrupted one continues with the units that are missing.
"""

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import ray
import ray.data

from bitray.data.job import Job, UnitResult, plan_job
from bitray.data.manifest import Manifest
from bitray.data.preparation import run_job
from bitray.data.settings import DataSettings
from bitray.data.sources import Unit
from bitray.data.units import UnitWorker, unpacked
from bitray.models.loading import load_tokenizer


def prepare(settings: DataSettings, tokenizer_path: str, length: int, root_uri: str) -> Manifest:
    """Prepare rows of `length` tokens below `root_uri`, under the Ray that is running.

    `UserError` for inputs that are missing, unreadable, mostly bad or empty, and for a folder that
    was prepared from something else.
    """
    return run_job(plan_job(settings, load_tokenizer(tokenizer_path), length, root_uri), on_ray)


def on_ray(
    job: Job,
    units: Sequence[Unit],
    reserved: float = 0.0,
    labels: Mapping[str, str] = MappingProxyType({}),
) -> Iterator[UnitResult]:
    """Results of units as they are done, on all CPUs but the `reserved` ones; if those leave less
    than one, on what is left of it. `labels` select the nodes."""
    if not units:
        return
    spare = max(0.0, ray.cluster_resources().get("CPU", 1.0) - reserved)
    cpus = max(1, int(spare))
    workers = min(len(units), cpus)
    rows = [{"unit": unit.dump()} for unit in units]
    items = ray.data.from_items(rows, override_num_blocks=len(rows))
    items.context.execution_options.label_selector = dict(labels) or None
    items.context.enable_progress_bars = items.context.print_on_execution_start = False
    results = items.map(
        UnitWorker,  # type: ignore[arg-type]  # Ray takes a class for an actor
        fn_constructor_args=(job.task, max(1, cpus // workers)),
        compute=ray.data.ActorPoolStrategy(size=workers),
        num_cpus=min(1.0, spare),
    )
    yield from unpacked(results.iter_rows())

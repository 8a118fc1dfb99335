"""The cluster under a run: who may reach it, and what it can hold."""

import ipaddress
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence

import ray
from ray.util.placement_group import (
    PlacementGroup,
    placement_group,
    placement_group_table,
    remove_placement_group,
)

from bitray.pipeline.autoscaler import autoscales, gives_up
from bitray.pipeline.config import Config
from bitray.pipeline.groups import Scaling
from bitray.settings import Passing, UserError

PREFLIGHT_SECONDS = 10.0
"""How long Ray may take to place workers and readers on nodes that are there and free."""
ROOM_SECONDS = 1.0
SLIVER = 1e-6
"""Of a CPU or a GPU: sums of parts are not exact."""


def check_dashboard(url: str) -> None:
    """`UserError` if others than this machine reach Ray's dashboard and need no token: its job API
    runs whatever it is sent."""
    host = url.removeprefix("http://").rpartition(":")[0].strip("[]")
    if not url or host == "localhost" or _is_loopback(host):
        return
    try:
        urllib.request.urlopen(f"http://{host}:{url.rpartition(':')[2]}/api/jobs/", timeout=3)
    except urllib.error.HTTPError as error:
        if error.code in (401, 403):
            return
    except OSError:
        return  # there is none, or not for us
    raise UserError(
        f"Ray's dashboard at {url} lets anybody on the network run code: start the cluster with "
        "RAY_AUTH_MODE=token in the environment, or with --dashboard-host=127.0.0.1"
    )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def reserved_cpus(scaling: Scaling, workers: int | None = None) -> float:
    """What so many workers, or the most there may be, and the readers take."""
    count = scaling.most if workers is None else workers
    return count * scaling.cpus_per_worker + scaling.readers * scaling.cpus_per_reader


def preflight(config: Config) -> None:
    """Have the workers and readers of every stage placed for a moment, as training will.

    `Passing` after seconds where the nodes cannot hold them; where others use them, or an
    autoscaler may bring more, after `scaling.patience_seconds`, which is said, or once an
    autoscaler gives up though nobody else uses the cluster.
    """
    checked: list[Scaling] = []
    for stage in config.stages:
        scaling = config.scaling_of(stage)
        if scaling not in checked:
            checked.append(scaling)
            _check_placement(stage, scaling)


def _check_placement(stage: str, scaling: Scaling) -> None:
    workers = _reserve(scaling.per_worker, scaling.fewest, scaling.placement, scaling.worker_labels)
    readers = _reserve(
        {"CPU": scaling.cpus_per_reader}, scaling.readers, "PACK", scaling.data_labels
    )
    groups = [workers, readers]
    try:
        if _placed(groups, ROOM_SECONDS):
            return
        patience = scaling.patience_seconds
        waits = f"scaling: stage {stage} waits up to {patience:g} s"
        never = capacity(scaling.per_worker) < scaling.fewest or _infeasible(groups)
        if not never or autoscales():
            if never:
                print(f"{waits}: an autoscaler may bring nodes", flush=True)
            if _placed(groups, PREFLIGHT_SECONDS):
                return
            if not never:
                print(f"{waits}: others use the nodes", flush=True)
            if _placed(groups, patience, until=_hopeless):
                return
        raise Passing(_refusal(stage, scaling))
    finally:
        for group in groups:
            remove_placement_group(group)


def _reserve(
    bundle: dict[str, float], count: int, strategy: str, labels: dict[str, str]
) -> PlacementGroup:
    selector = [labels] * count if labels else None
    return placement_group([bundle] * count, strategy, bundle_label_selector=selector)


def _placed(
    groups: Sequence[PlacementGroup],
    seconds: float,
    until: Callable[[Sequence[PlacementGroup]], bool] | None = None,
) -> bool:
    """Whether all are placed before so many seconds are over, or `until` holds."""
    end = time.monotonic() + seconds
    if until is None:
        return all(group.wait(max(0.1, end - time.monotonic())) for group in groups)
    while not _placed(groups, ROOM_SECONDS):
        if time.monotonic() > end or until(groups):
            return False
    return True


def _hopeless(groups: Sequence[PlacementGroup]) -> bool:
    """Whether an autoscaler gives up on some, and nobody will make room for them."""
    if not any(map(gives_up, groups)):
        return False
    used = Counter(ray.cluster_resources())
    used.subtract(ray.available_resources())
    for group in groups:
        if placement_group_table(group)["state"] == "CREATED":
            for bundle in group.bundle_specs:
                used.subtract(bundle)
    return all(used[kind] < SLIVER for kind in ("CPU", "GPU"))


def _infeasible(groups: Sequence[PlacementGroup]) -> bool:
    states = [placement_group_table(group)["stats"]["scheduling_state"] for group in groups]
    return "INFEASIBLE" in states


def _refusal(stage: str, scaling: Scaling) -> str:
    nodes = [
        ", ".join(f"{node['Resources'].get(key, 0.0):g} {key}" for key in scaling.per_worker)
        for node in ray.nodes()
        if node["Alive"]
    ]
    each = ", ".join(f"{value:g} {key}" for key, value in scaling.per_worker.items())
    labels = [
        f"{name}={given}"
        for name in ("worker_labels", "data_labels")
        if (given := getattr(scaling, name))
    ]
    said = "".join(f", {text}" for text in labels)
    return (
        f"scaling: stage {stage} needs {scaling.fewest} workers of {each} (placement="
        f"{scaling.placement}{said}) and {scaling.readers} readers of {scaling.cpus_per_reader:g} "
        f"CPU, which these nodes cannot hold: {'; '.join(nodes)}; lower scaling.num_workers or "
        "what each takes, or start more nodes"
    )


def capacity(per_worker: dict[str, float]) -> int:
    """Workers that the nodes would hold if they held nothing else."""
    return sum(
        int(min(node["Resources"].get(key, 0.0) / value for key, value in per_worker.items()))
        for node in ray.nodes()
        if node["Alive"]
    )


def room(
    bundle: dict[str, float], fewest: int, most: int, strategy: str, labels: dict[str, str]
) -> int:
    """How many workers between `fewest` and `most` can be placed now, found by placing them; the
    fewest where not even those can be."""
    known, least_refused = fewest, most + 1
    asked, seconds = most, 3 * ROOM_SECONDS  # what was there before may only just be going
    while known + 1 < least_refused:
        group = _reserve(bundle, asked, strategy, labels)
        try:
            if _placed([group], seconds):
                known = asked
            else:
                least_refused = asked
        finally:
            remove_placement_group(group)
        asked, seconds = (known + least_refused) // 2, ROOM_SECONDS
    return known


def room_for_another(scaling: Scaling) -> bool:
    """Whether the cluster holds one more worker now."""
    group = _reserve(scaling.per_worker, 1, "PACK", scaling.worker_labels)
    try:
        return bool(group.wait(ROOM_SECONDS))
    finally:
        remove_placement_group(group)

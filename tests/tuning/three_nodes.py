"""A sweep on three nodes, one of which goes in the middle of a trial; what happened, as JSON.

python three_nodes.py SPACE FOLDER [overrides]
"""

import json
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import ray
from ray import tune
from ray.cluster_utils import Cluster
from ray.util import placement_group_table
from ray.util.state import list_actors

from bitray.events import read_events
from bitray.tuning import SearchSpace
from bitray.tuning import sweep as sweeps

PATIENCE = 120.0


def groups() -> dict[str, list[str]]:
    """Placement groups of workers and their nodes; those of Tune ask for next to nothing."""
    return {
        key: sorted(set(group["bundles_to_node_id"].values()))
        for key, group in placement_group_table().items()
        if group["state"] == "CREATED"
        and sum(bundle.get("CPU", 0) for bundle in group["bundles"].values()) > 0.1
    }


def checkpoints(run: Path) -> int:
    return len(list(run.glob("stage2_checkpoint/checkpoints/step_*/COMPLETE")))


def trial_of(pid: int) -> str | None:
    """The trial whose metrics a process writes."""
    try:
        files = [Path(file.path) for file in psutil.Process(pid).open_files()]
    except psutil.NoSuchProcess:
        return None
    return next((f.parent.name for f in files if f.name == "metrics.jsonl"), None)


def generations(run: Path) -> list[int]:
    """How often the rows of each stage that is trained in a trial were opened."""
    files = [run / "mixture" / f"{stage}.json" for stage in ("stage1_9", "stage2")]
    return [json.loads(f.read_text())["generation"] if f.exists() else 0 for f in files]


def rewound(run: Path) -> bool:
    """Whether a trial that diverges was begun again from a checkpoint."""
    return any(event["kind"] == "rewind" for event in read_events(str(run)))


class Watch(threading.Thread):
    """Looks at the cluster while a sweep goes on, and takes a node away once."""

    def __init__(self, cluster: Any, trials: Path) -> None:
        super().__init__(daemon=True)
        self.cluster, self.trials = cluster, trials
        self.spread, self.beside = set(), 0
        self.lost: dict[str, Any] = {}
        self.stops: list[tuple[float, set[str]]] = []
        self.freed: list[float] = []
        self.over = False

    def run(self) -> None:
        while not self.over:
            here = groups()
            self.beside = max(self.beside, len(here))
            self.spread |= {node for nodes in here.values() for node in nodes}
            for since, there in list(self.stops):
                if there - here.keys():  # one of those that were there is gone
                    self.stops.remove((since, there))
                    self.freed.append(time.monotonic() - since)
            if not self.lost and len(self.spread) == 3:
                self.lose()
            time.sleep(0.5)

    def lose(self) -> None:
        """Remove a node on which a trial trains that has left a checkpoint of Stage 2."""
        nodes = {node.node_id: node for node in self.cluster.worker_nodes}
        for worker in list_actors(filters=[("class_name", "=", "RayTrainWorker")]):
            run = self.trials / (trial_of(worker.pid) or "none")
            if worker.state != "ALIVE" or worker.node_id not in nodes or not checkpoints(run):
                continue
            files = self.trials.glob("*/metrics.jsonl")
            self.lost = {"trial": run.name, "before": {f.parent.name: f.read_text() for f in files}}
            self.cluster.remove_node(nodes[worker.node_id], allow_graceful=False)
            return


class Stopped(tune.Callback):
    """Tells the watch of trials that ended early."""

    watch: Watch

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        if trial.last_result.get("progress", 1) < 1 and not trial.last_result.get("abandoned"):
            self.watch.stops.append((time.monotonic(), set(groups())))


def wait_for(condition: Any) -> float:
    """Seconds until it holds; infinite after `PATIENCE`."""
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > PATIENCE:
            return float("inf")
        time.sleep(0.5)
    return time.monotonic() - began


OF_THE_CLUSTER = (
    "TrainStateActor", "ActorLocationTracker", "_UsageCollectionActor", "_StatsActor",
    "_AutoscalingCoordinatorActor",
)  # fmt: skip
"""Actors of Ray's that live as long as the cluster."""


def alive() -> list[str]:
    actors = [a for a in list_actors() if a.state != "DEAD" and a.class_name not in OF_THE_CLUSTER]
    return [f"{actor.class_name} {actor.state}" for actor in actors]


def main() -> None:
    path, folder, *words = sys.argv[1:]
    space = SearchSpace.load(path, [*words, f"output_dir={folder}", "experiment=nodes"])
    trials = Path(folder, "nodes", "trials")
    cluster = Cluster(
        initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": True}
    )
    for _ in range(2):
        cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    watch = Watch(cluster, trials)
    Stopped.watch = watch
    made = sweeps._tuner

    def watched(*arguments: Any) -> Any:
        tuner = made(*arguments)
        tuner._local_tuner._run_config.callbacks.append(Stopped())
        watch.start()
        return tuner

    sweeps._tuner = watched
    print(sweeps.sweep(space, "nodes"), flush=True)
    watch.over = True
    watch.join()
    total = ray.cluster_resources()["CPU"]
    released = wait_for(lambda: not groups() and ray.available_resources().get("CPU") == total)
    gone = wait_for(lambda: not alive())
    before = watch.lost.get("before", {})
    said = {
        "beside": watch.beside,
        "nodes": len(watch.spread),
        "lost": watch.lost.get("trial"),
        "freed": watch.freed,
        "not_freed": len(watch.stops),
        "released": released,
        "gone": gone,
        "alive": alive(),
        "generations": {run.name: generations(run) for run in trials.iterdir()},
        "rewound": [run.name for run in trials.iterdir() if rewound(run)],
        "kept": {
            name: kept(text, (trials / name / "metrics.jsonl").read_text())
            for name, text in before.items()
        },
    }
    print("FOUND " + json.dumps(said), flush=True)
    ray.shutdown()
    cluster.shutdown()


def kept(before: str, after: str) -> list[int]:
    """Lines at the loss of the node, and how many of them were not written again."""
    lines, now = before.splitlines(), after.splitlines()
    return [len(lines), sum(line in now for line in lines)]


if __name__ == "__main__":
    main()

"""A Ray cluster of several nodes on this machine, in a process of its own: what is said on its
standard input is done and answered, a line of JSON each.

    {"add": {"num_cpus": 1, ...}} -> {"pid": raylet's, ...}      {"kill": number} -> {}

Its environment decides about token authentication, which Ray reads once per process.
"""

import json
import os
import sys
from typing import Any

TRIES = 5
"""Ray gives a node that starts 30 s, which crowded machines do not always keep."""


def added(cluster: Any, given: dict[str, Any]) -> Any:
    """A node more."""
    for left in reversed(range(TRIES)):
        try:
            return cluster.add_node(**given)
        except Exception:
            if not left:
                raise
    return None


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    from ray.cluster_utils import Cluster

    cluster, nodes = Cluster(), list[Any]()
    for line in sys.stdin:
        what, given = next(iter(json.loads(line).items()))
        answer: dict[str, Any] = {}
        if what == "add":
            nodes.append(added(cluster, given))
            raylet = nodes[-1].all_processes["raylet"][0].process
            answer = {"pid": raylet.pid, "address": cluster.address}
            answer["dashboard"] = cluster.webui_url
        else:
            cluster.remove_node(nodes[given], allow_graceful=False)
        answers.write(json.dumps(answer) + "\n")
    cluster.shutdown()


if __name__ == "__main__":
    main()

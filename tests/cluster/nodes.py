"""A Ray cluster of several nodes on this machine, in a process of its own: what is said on its
standard input is done and answered, a line of JSON each.

    {"add": {"num_cpus": 1, ...}} -> {"pid": raylet's, ...}      {"kill": number} -> {}

Its environment decides about token authentication, which Ray reads once per process.
"""

import json
import os
import sys
from typing import Any


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what Ray prints is no answer
    from ray.cluster_utils import Cluster

    cluster, nodes = Cluster(), list[Any]()
    for line in sys.stdin:
        what, given = next(iter(json.loads(line).items()))
        answer: dict[str, Any] = {}
        if what == "add":
            nodes.append(cluster.add_node(**given))
            raylet = nodes[-1].all_processes["raylet"][0].process
            answer = {"pid": raylet.pid, "address": cluster.address}
            answer["dashboard"] = cluster.webui_url
        else:
            cluster.remove_node(nodes[given], allow_graceful=False)
        answers.write(json.dumps(answer) + "\n")
    cluster.shutdown()


if __name__ == "__main__":
    main()

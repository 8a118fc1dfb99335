"""What Ray's autoscaler tells: whether there is one, and of what it can never bring the nodes.

What it may start at the most it tells nobody (Ray 2.60).
"""

import json
from typing import Any

from ray._private.ray_constants import DEBUG_AUTOSCALING_STATUS
from ray._private.worker import global_worker
from ray.autoscaler._private.util import format_readonly_node_type
from ray.core.generated import autoscaler_pb2
from ray.experimental.internal_kv import _internal_kv_get
from ray.util.placement_group import PlacementGroup


def autoscales() -> bool:
    """Whether an autoscaler, of Ray's second kind or of its first, looks after the cluster. Where
    there is none, the first kind tells of nodes each of which is a type of its own."""
    if _state().autoscaler_state_version:
        return True
    told = json.loads(_internal_kv_get(DEBUG_AUTOSCALING_STATUS) or "{}")
    types = told.get("autoscaler_report", {}).get("node_type_mapping") or {}
    return any(kind != format_readonly_node_type(node) for node, kind in types.items())


def gives_up(group: PlacementGroup) -> bool:
    """Whether it says, as things are, that its nodes will not hold the group; the second kind
    does."""
    name = group.id.hex()
    return any(each.details.startswith(name) for each in _state().infeasible_gang_resource_requests)


def _state() -> Any:
    """What the second kind reports; all zeros and empty where there is none."""
    messages: Any = autoscaler_pb2  # made without types, as the client is
    worker: Any = global_worker
    reply = messages.GetClusterStatusReply()
    reply.ParseFromString(worker.gcs_client.get_cluster_status())
    return reply.autoscaling_state

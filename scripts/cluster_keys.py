"""What is known of cluster files: keys of Ray's launcher, clouds' machines, KubeRay's manifests.

A table maps a key to the table of what lies below it; None is any value, WORD one with nothing
below it, a tuple the values that are known, a list of one table a list of such, a function makes
its table when it is asked for. A key that ends in ! has to be there.
"""

import gzip
import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple

from bitray.settings import nearest

Place = tuple[str | int, ...]
ANY = {"*": None}
"""A mapping of names that are the user's own."""
WORD = "a word or a number"


class Problem(NamedTuple):
    """What is wrong, and where."""

    path: Place
    text: str


@cache
def ec2_table(name: str) -> Any:
    """What EC2 knows under a name, as botocore describes it."""
    shape = _ec2_shapes()[name]
    if shape["type"] == "structure":
        return {key: ec2_table(member["shape"]) for key, member in shape["members"].items()}
    if shape["type"] == "list":
        return [ec2_table(shape["member"]["shape"])]
    return tuple(shape["enum"]) if "enum" in shape else None


@cache
def _ec2_shapes() -> dict[str, Any]:
    import botocore

    folder = sorted((Path(botocore.__file__).parent / "data" / "ec2").glob("20*"))[-1]
    shapes: dict[str, Any] = json.loads(
        gzip.decompress((folder / "service-2.json.gz").read_bytes())
    )
    return shapes["shapes"]


def aws_machine() -> dict[str, Any]:
    """Arguments of RunInstances, and one of Ray's own."""
    known = dict(ec2_table("RunInstancesRequest"))
    del known["InstanceType"]  # new ones come faster than releases of botocore
    return {**known, "InstanceType!": None, "SubnetIds": None}


GCP_DISK = {
    "boot": None, "autoDelete": None, "type": ("PERSISTENT", "SCRATCH"), "mode": None,
    "deviceName": None, "interface": None, "source": None, "diskSizeGb": None, "kind": None,
    "initializeParams": {
        "diskSizeGb": None, "sourceImage": None, "diskType": None, "diskName": None,
        "labels": ANY, "sourceSnapshot": None, "provisionedIops": None,
    },
}  # fmt: skip
GCP_SCHEDULING = {
    "preemptible": (True, False),
    "provisioningModel": ("SPOT", "STANDARD", "FLEX_START", "RESERVATION_BOUND"),
    "instanceTerminationAction": ("DELETE", "STOP"), "onHostMaintenance": ("TERMINATE", "MIGRATE"),
    "automaticRestart": (True, False), "nodeAffinities": None, "maxRunDuration": None,
    "minNodeCpus": None, "localSsdRecoveryTimeout": None, "terminationTime": None,
}  # fmt: skip
GCP_MACHINE = {
    "machineType!": None, "disks": [GCP_DISK], "labels": ANY, "scheduling": GCP_SCHEDULING,
    "metadata": {"items": [{"key": None, "value": None}]}, "tags": {"items": None},
    "serviceAccounts": [{"email": None, "scopes": None}], "networkInterfaces": None,
    "guestAccelerators": [{"acceleratorType": None, "acceleratorCount": None}],
    "sourceInstanceTemplate": None, "minCpuPlatform": None, "canIpForward": None,
    "shieldedInstanceConfig": None, "confidentialInstanceConfig": None, "description": None,
    "reservationAffinity": None, "resourcePolicies": None, "deletionProtection": None,
    "advancedMachineFeatures": None, "networkPerformanceConfig": None, "zone": None,
    "acceleratorType": None, "acceleratorConfig": ANY, "runtimeVersion": None,
    "schedulingConfig": ANY,
}  # fmt: skip


@cache
def azure_machine() -> dict[str, Any]:
    """Parameters of the template that Ray deploys, less those that it fills in itself."""
    import ray.autoscaler

    folder = Path(ray.autoscaler.__file__).parent / "_private" / "_azure"
    template = json.loads((folder / "azure-vm-template.json").read_text())
    own = {"vmName", "vmTags", "vmCount", "provisionPublicIp", "msi", "nsg", "subnet", "zones"}
    own |= {"adminUsername", "publicKey", "vmSize", "priority", "billingProfile"}
    known = dict.fromkeys(set(template["parameters"]) - own)
    values = {"priority": ("Spot", "Regular", "Low"), "billingProfile": {"maxPrice": None}}
    arm = {**known, **values, "vmSize!": None, "availability_zone": None, "adminUsername": None}
    return {"azure_arm_parameters!": arm, "tags": ANY}


MACHINES = {"aws": aws_machine, "gcp": GCP_MACHINE, "azure": azure_machine}
COMMON = dict.fromkeys((
    "use_internal_ips", "cache_stopped_nodes", "disable_node_updaters", "worker_liveness_check",
    "disable_launch_config_check", "foreground_node_launch",
))  # fmt: skip
PROVIDERS: dict[str, dict[str, Any]] = {
    "aws": COMMON | {
        "type!": None, "region!": None, "availability_zone": None,
        "security_group": {
            "GroupName": None, "IpPermissions": [partial(ec2_table, "IpPermission")],
        },
        "key_pair": {"key_name": None}, "aws_credentials": ANY, "cloudwatch": ANY,
    },
    "gcp": COMMON | {
        "type!": None, "region!": None, "availability_zone!": None, "project_id!": None,
        "gcp_credentials": {"type": ("credentials_token", "service_account"), "credentials": None},
    },
    "azure": COMMON | {
        "type!": None, "location!": None, "resource_group!": None, "subscription_id": None,
        "availability_zone": None, "tags": ANY, "subnet_mask": None, "unique_id": None,
        "msi_name": None, "msi_resource_group": None, "use_external_head_ip": None,
    },
    "local": COMMON | {
        "type!": None, "head_ip!": None, "worker_ips!": None, "external_head_ip": None,
    },
}  # fmt: skip


def launcher_keys(tree: Any) -> dict[str, Any]:
    """Keys of a launcher's file: Ray's schema, with what it leaves open."""
    kind = tree["provider"]["type"]
    known = _of_schema(ray_schema())
    node = known.pop("available_node_types")["*"]
    needed = ("cluster_name", "provider", "max_workers", "auth", "file_mounts")
    needed += ("head_start_ray_commands", "worker_start_ray_commands")
    known["provider"] = PROVIDERS[kind]
    if kind == "local":
        known["min_workers"] = None  # which Ray moves to where the schema has it
        known.pop("head_node_type")
    else:
        node = {**node, "node_config!": MACHINES[kind], "resources!": ANY, "labels": ANY}
        known["available_node_types!"] = {"*": _required(node, ())}
        needed += ("head_node_type", "docker")
    return _required(known, needed)


def _required(table: dict[str, Any], needed: Sequence[str]) -> dict[str, Any]:
    marked = {key.rstrip("!") for key in table if key.endswith("!")}
    table = {key: value for key, value in table.items() if key.endswith("!") or key not in marked}
    return {f"{key}!" if key in needed else key: value for key, value in table.items()}


@cache
def ray_schema() -> dict[str, Any]:
    """Ray's own description of a launcher's file."""
    import ray.autoscaler

    text = (Path(ray.autoscaler.__file__).parent / "ray-schema.json").read_text()
    found: dict[str, Any] = json.loads(text)
    return found


def _of_schema(schema: Mapping[str, Any]) -> Any:
    if "patternProperties" in schema:
        return {"*": _of_schema(schema["patternProperties"][".*"])}
    if "properties" in schema:
        return {key: _of_schema(below) for key, below in schema["properties"].items()}
    if schema.get("$ref") == "#/definitions/commands":
        return [None]
    return {"object": ANY, "array": None}.get(str(schema.get("type", "array")), WORD)


# What KubeRay 1.5 (ray.io/v1) and Kubernetes know of what a cluster of ours may say.
VOLUME = dict.fromkeys((
    "name!", "persistentVolumeClaim", "emptyDir", "configMap", "secret", "csi", "ephemeral",
    "hostPath", "nfs", "projected", "downwardAPI", "image",
))  # fmt: skip
RESOURCES = {"limits": ANY, "requests": ANY, "claims": None}
CONTAINER = dict.fromkeys((
    "name!", "image!", "imagePullPolicy", "command", "args", "workingDir", "envFrom", "lifecycle",
    "livenessProbe", "readinessProbe", "startupProbe", "securityContext", "stdin", "tty",
    "terminationMessagePath", "terminationMessagePolicy", "restartPolicy", "volumeDevices",
    "resizePolicy",
)) | {
    "resources": RESOURCES,
    "env": [{"name!": None, "value": None, "valueFrom": None}],
    "ports": [dict.fromkeys(("name", "containerPort!", "hostPort", "hostIP", "protocol"))],
    "volumeMounts": [dict.fromkeys((
        "name!", "mountPath!", "subPath", "subPathExpr", "readOnly", "mountPropagation",
        "recursiveReadOnly",
    ))],
}  # fmt: skip
CAPACITIES = {
    "karpenter.sh/capacity-type": ("spot", "on-demand", "reserved"),
    "eks.amazonaws.com/capacityType": ("SPOT", "ON_DEMAND", "CAPACITY_BLOCK"),
    "cloud.google.com/gke-spot": ("true",),
    "cloud.google.com/gke-provisioning": ("spot", "standard"),
    "kubernetes.azure.com/scalesetpriority": ("spot", "regular"),
}
"""Labels of nodes that tell how they are paid for; the first value is spot."""
REQUIRED = "requiredDuringSchedulingIgnoredDuringExecution"
AFFINITY = {
    "podAffinity": None, "podAntiAffinity": None,
    "nodeAffinity": {
        "preferredDuringSchedulingIgnoredDuringExecution": None,
        REQUIRED: {"nodeSelectorTerms!": [{"matchFields": None, "matchExpressions": [{
            "key!": WORD, "values": None,
            "operator!": ("In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"),
        }]}]},
    },
}  # fmt: skip
METADATA = {"name": None, "namespace": None, "labels": ANY, "annotations": ANY,
            "generateName": None, "finalizers": None}  # fmt: skip
POD = {
    "metadata": METADATA,
    "spec!": dict.fromkeys((
        "serviceAccountName", "serviceAccount", "securityContext", "schedulerName",
        "priorityClassName", "runtimeClassName", "restartPolicy", "imagePullSecrets", "hostNetwork",
        "hostPID", "hostIPC", "hostname", "subdomain", "hostAliases", "dnsPolicy", "dnsConfig",
        "activeDeadlineSeconds", "terminationGracePeriodSeconds", "topologySpreadConstraints",
        "automountServiceAccountToken", "shareProcessNamespace", "enableServiceLinks", "nodeName",
        "priority", "preemptionPolicy", "overhead", "readinessGates", "resourceClaims", "os",
        "setHostnameAsFQDN", "schedulingGates", "hostUsers", "ephemeralContainers",
    )) | {
        "containers!": [CONTAINER], "initContainers": [CONTAINER], "volumes": [VOLUME],
        "nodeSelector": ANY | CAPACITIES, "affinity": AFFINITY, "tolerations": [dict.fromkeys((
            "key", "operator", "value", "effect", "tolerationSeconds"))],
    },
}  # fmt: skip


@cache
def ray_start() -> dict[str, Any]:
    """The options of `ray start`."""
    from ray.scripts.scripts import start

    return {word.lstrip("-"): WORD for option in start.params for word in option.opts}


SERVICE = {"apiVersion": None, "kind": None, "metadata": METADATA, "spec": dict.fromkeys((
    "type", "ports", "selector", "clusterIP", "clusterIPs", "externalIPs", "externalName",
    "externalTrafficPolicy", "internalTrafficPolicy", "ipFamilies", "ipFamilyPolicy",
    "loadBalancerClass", "loadBalancerIP", "loadBalancerSourceRanges", "healthCheckNodePort",
    "allocateLoadBalancerNodePorts", "publishNotReadyAddresses", "sessionAffinity",
    "sessionAffinityConfig", "trafficDistribution",
))}  # fmt: skip
GROUP = {"rayStartParams!": ray_start, "template!": POD, "labels": ANY, "resources": ANY}
RAY_CLUSTER = {
    "rayVersion!": None, "enableInTreeAutoscaling!": (True, False), "suspend": (True, False),
    "authOptions!": {"mode!": ("token",), "secretName": None, "enableK8sTokenAuth": None},
    "autoscalerOptions": {
        "version": ("v1", "v2"), "upscalingMode": ("Default", "Aggressive", "Conservative"),
        "resources": RESOURCES, **dict.fromkeys((
            "idleTimeoutSeconds", "image", "imagePullPolicy", "env", "envFrom", "volumeMounts",
            "securityContext", "command", "args",
        )),
    },
    "headGroupSpec!": GROUP | {
        "serviceType": ("ClusterIP", "NodePort", "LoadBalancer", "ExternalName"),
        "headService": SERVICE, "enableIngress": (True, False), "ingressOptions": None,
    },
    "workerGroupSpecs!": [GROUP | dict.fromkeys((
        "groupName!", "replicas", "minReplicas!", "maxReplicas!", "numOfHosts", "suspend",
        "idleTimeoutSeconds", "scaleStrategy", "priority",
    ))],
    **dict.fromkeys((
        "gcsFaultToleranceOptions", "managedBy", "headServiceAnnotations", "upgradeStrategy",
        "historyServerOptions", "networkPolicy", "tlsOptions",
    )),
}  # fmt: skip
RAY_JOB = {
    "entrypoint!": None, "rayClusterSpec!": RAY_CLUSTER,
    "submissionMode": ("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
    "submitterPodTemplate": POD, "metadata": ANY, "clusterSelector": ANY,
    **dict.fromkeys((
        "activeDeadlineSeconds", "backoffLimit", "submitterConfig", "managedBy", "jobId",
        "deletionStrategy", "runtimeEnvYAML", "entrypointNumCpus", "entrypointNumGpus",
        "entrypointResources", "shutdownAfterJobFinishes!", "ttlSecondsAfterFinished", "suspend",
        "preRunningDeadlineSeconds",
    )),
}  # fmt: skip
HEADER = {"apiVersion!": ("ray.io/v1",), "kind!": None, "metadata!": METADATA, "status": None}
MANIFESTS = {"RayCluster": HEADER | {"spec!": RAY_CLUSTER}, "RayJob": HEADER | {"spec!": RAY_JOB}}
SELECTOR = {"matchLabels": ANY, "matchExpressions": None}
NETWORK_POLICY = {
    "apiVersion!": ("networking.k8s.io/v1",), "kind!": ("NetworkPolicy",), "metadata!": METADATA,
    "spec!": {
        "podSelector!": SELECTOR, "policyTypes": None, "egress": None,
        "ingress": [{"ports": None, "from": [{
            "podSelector": SELECTOR, "namespaceSelector": SELECTOR,
            "ipBlock": {"cidr!": None, "except": None},
        }]}],
    },
}  # fmt: skip


def wrong_keys(given: Any, table: Any, at: Place = ()) -> Iterator[Problem]:
    """Keys that nobody knows, that are missing, and values outside of what is known."""
    if callable(table):
        table = table()
    if isinstance(table, list):
        if isinstance(given, list):
            for index, each in enumerate(given):
                yield from wrong_keys(each, table[0], (*at, index))
        else:
            yield Problem(at, f"expected a list, found {given!r}")
    elif table == WORD:
        if isinstance(given, dict | list):
            yield Problem(at, f"expected {WORD}, found {given!r}")
    elif isinstance(table, tuple):
        if given not in table or isinstance(given, bool) != isinstance(table[0], bool):
            names = [str(value) for value in table]
            yield Problem(
                at, f"{given!r} is none of {', '.join(names)}{nearest(str(given), names)}"
            )
    elif isinstance(table, dict):
        # Ray's example of scheduling is a list
        if at[-1:] == ("scheduling",) and isinstance(given, list) and len(given) == 1:
            given, at = given[0], (*at, 0)
        yield from _wrong_below(given, table, at)


def _wrong_below(given: Any, table: Mapping[str, Any], at: Place) -> Iterator[Problem]:
    if not isinstance(given, dict):
        yield Problem(at, f"expected keys below it, found {given!r}")
        return
    known = {key.rstrip("!"): below for key, below in table.items()}
    for key, value in given.items():
        if key not in known and "*" not in known:
            yield Problem((*at, key), f"there is no such key{nearest(str(key), known)}")
        else:
            yield from wrong_keys(value, known.get(key, known.get("*")), (*at, key))
    for key in table:
        if key.endswith("!") and key[:-1] not in given:
            yield Problem(at, f"{key[:-1]} is missing")

"""Checks cluster files before they cost money: `check_cluster_yaml.py FILE...`.

Ray's own validator lets a misspelt key of a provider or a node pass, and the cloud ignores it: what
should have been a spot machine is not. Each problem is told with file, line, path and one sentence.
Knows files of Ray's launcher, KubeRay's manifests, and shell scripts that call `ray start`.
"""

import logging
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from cluster_keys import (
    CAPACITIES,
    MANIFESTS,
    NETWORK_POLICY,
    PROVIDERS,
    REQUIRED,
    Place,
    Problem,
    launcher_keys,
    wrong_keys,
)
from cluster_shell import Command, commands, ray_starts

from bitray.settings import nearest

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Document(NamedTuple):
    """A YAML document, the line on which each of its paths begins, and what is there twice."""

    tree: Any
    lines: Mapping[Place, int]
    repeated: Sequence[Problem]


def unpinned(image: object) -> str | None:
    """Why an image may be another one tomorrow."""
    name, _, digest = str(image).partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if digest or (tag and not re.search(r"latest|nightly|master|main", tag)):
        return None
    return f"{image} is not pinned; name a version, as in rayproject/ray:2.60.0-py311-gpu"


def start_problems(start: Command, token: str | None, may_work: bool) -> Iterator[str]:
    """What is wrong with a command that starts Ray. `token`: the file that is mounted."""
    if start.environment.get("RAY_AUTH_MODE") != "token":
        yield "RAY_AUTH_MODE=token is not exported before ray start, so anybody may submit"
    path = start.environment.get("RAY_AUTH_TOKEN_PATH", "~/.ray/auth_token")
    if token is not None and path != token:
        yield f"Ray will read its token from {path}, but it is mounted at {token}"
    host = start.option("--dashboard-host")
    if host is not None and host not in LOOPBACK:
        yield f"the dashboard listens on {host}; take 127.0.0.1 and ssh to it"
    if "--head" in start.words and not may_work and start.option("--num-cpus") != "0":
        yield "the head takes work, which dies with it or starves it; add --num-cpus=0"


def installs_old_rclone(command: Command) -> bool:
    """Whether rclone comes from a distribution: Ubuntu 22.04 has 1.53, and `:s3,env_auth:` is known
    from 1.55 on."""
    return {"install", "rclone"} <= set(command.words)


OLD_RCLONE = ("a distribution's rclone may be too old to mount by URI; install a release, as in "
              "https://downloads.rclone.org/v1.72.1/rclone-v1.72.1-linux-amd64.deb")  # fmt: skip


def launcher_problems(tree: Any) -> Iterator[Problem]:
    """What is wrong with a launcher's file that its keys do not show."""
    tokens = [
        path for path in map(str, tree.get("file_mounts") or {}) if path.endswith("auth_token")
    ]
    if not tokens:
        yield Problem(("file_mounts",), "no token is mounted; add /home/ray/.ray/auth_token: "
                      "~/.ray/auth_token, which `ray get-auth-token --generate` makes")  # fmt: skip
    local = tree["provider"]["type"] == "local"
    alone = local and not tree["provider"].get("worker_ips")
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        starts = [
            (number, start)
            for number, text in enumerate(tree.get(key) or ())
            for start in ray_starts(str(text))
        ]
        if not starts:
            yield Problem((key,), "nothing starts Ray here, or Ray's default does, without a token")
        for number, start in starts:
            texts = start_problems(start, tokens[0] if tokens else None, alone or not local)
            yield from (Problem((key, number), text) for text in texts)
    for key in ("initialization_commands", "setup_commands"):
        for number, text in enumerate(tree.get(key) or ()):
            if any(map(installs_old_rclone, commands(str(text)))):
                yield Problem((key, number), OLD_RCLONE)
    for number, rule in enumerate(
        _below(tree, "provider", "security_group", "IpPermissions") or ()
    ):
        if _to_the_world(rule) and (rule.get("FromPort"), rule.get("ToPort")) != (22, 22):
            at = ("provider", "security_group", "IpPermissions", number)
            yield Problem(at, "opens more than ssh to the whole world")
    docker = tree.get("docker") or {}
    for key in ("image", "head_image", "worker_image"):
        if key in docker and (why := unpinned(docker[key])):
            yield Problem(("docker", key), why)
    if not local:
        yield from node_problems(tree)


def _to_the_world(rule: Any) -> bool:
    """Whether a rule of a firewall lets in addresses of which only the first bits are told."""
    ranges = [*(_below(rule, "IpRanges") or ()), *(_below(rule, "Ipv6Ranges") or ())]
    told = (_below(each, "CidrIp") or _below(each, "CidrIpv6") for each in ranges)
    return any(re.search(r"/[0-7]$", str(address)) for address in told)


def node_problems(tree: Any) -> Iterator[Problem]:
    """What is wrong with the machines of a cloud."""
    types, head = tree.get("available_node_types") or {}, tree.get("head_node_type")
    if head is not None and head not in types:
        at = ("head_node_type",)
        yield Problem(at, f"there is no node type {head}{nearest(str(head), types)}")
    for name, node in types.items():
        at, machine = ("available_node_types", name), node.get("node_config") or {}
        spot = _is_spot(tree["provider"]["type"], machine)
        yield from (Problem((*at, "node_config", *p), why) for p, why in unpinned_machine(machine))
        if name == head:
            busy = {
                k: v for k, v in (node.get("resources") or {}).items() if k in ("CPU", "GPU") and v
            }
            if busy or "CPU" not in (node.get("resources") or {}):
                text = "the head takes work, which dies with it or starves it; set CPU: 0, no GPU"
                yield Problem((*at, "resources"), text)
            if spot:
                yield Problem((*at, "node_config"), SPOT_HEAD)
        elif (node.get("resources") or {}).get("GPU") and not spot:
            yield Problem((*at, "node_config"), not_spot(tree["provider"]["type"]))


def unpinned_machine(machine: Any) -> Iterator[Problem]:
    """Images of machines that may be others tomorrow."""
    arm = _below(machine, "azure_arm_parameters")
    if _below(arm, "imageOffer") and _below(arm, "imageVersion") in (None, "", "latest"):
        yield Problem(("azure_arm_parameters", "imageVersion"), "the image is not pinned; name a "
                      "version, which `az vm image list --all` tells")  # fmt: skip
    for number, disk in enumerate(_below(machine, "disks") or ()):
        image = _below(disk, "initializeParams", "sourceImage")
        if "/family/" in str(image):
            text = "a family's image changes; name one of `gcloud compute images list`"
            yield Problem(("disks", number, "initializeParams", "sourceImage"), text)


SPOT = {
    "aws": "InstanceMarketOptions: {MarketType: spot}",
    "gcp": "scheduling: {provisioningModel: SPOT}",
    "azure": "azure_arm_parameters.priority: Spot",
    "kuberay": "nodeSelector: {karpenter.sh/capacity-type: spot}, or your cloud's label",
}
"""How each cloud spells it."""
SPOT_HEAD = "a spot head takes the cluster with it when it goes; take it on demand"


def not_spot(where: str) -> str:
    return f"these GPUs are not spot ones, at two or three times the price; say {SPOT[where]}"


def _is_spot(provider: str, machine: Any) -> bool:
    if provider == "aws":
        return _below(machine, "InstanceMarketOptions", "MarketType") == "spot"
    if provider == "azure":
        return _below(machine, "azure_arm_parameters", "priority") == "Spot"
    said = machine.get("scheduling") or {}
    said = said[0] if isinstance(said, list) and said else said
    return said.get("provisioningModel") == "SPOT" or said.get("preemptible") is True


def _below(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def manifest_problems(tree: Any, policies: Sequence[Any]) -> Iterator[Problem]:
    """What is wrong with a KubeRay manifest that its keys do not show. `policies`: those of the
    file, behind which a RayJob's dashboard may be asked by the operator."""
    job = tree["kind"] == "RayJob"
    at: Place = ("spec", "rayClusterSpec") if job else ("spec",)
    cluster = _below(tree, *map(str, at)) or {}
    head = cluster.get("headGroupSpec") or {}
    start = head.get("rayStartParams") or {}
    host = start.get("dashboard-host", "0.0.0.0")  # KubeRay's default
    if host not in LOOPBACK and not (job and guarded(head, tree, policies)):
        needs = (
            "a NetworkPolicy in the same file that selects the head and says who may come in"
            if job
            else "127.0.0.1 and kubectl port-forward"
        )
        where = (*at, "headGroupSpec", "rayStartParams")
        yield Problem(where, f"the dashboard listens on {host}; it needs {needs}")
    yield from (Problem((*at, "headGroupSpec", *p), text) for p, text in head_problems(head))
    groups = [("headGroupSpec", head)]
    groups += [(n, group) for n, group in enumerate(cluster.get("workerGroupSpecs") or ())]
    for name, group in groups:
        where = (*at, name) if isinstance(name, str) else (*at, "workerGroupSpecs", name)
        yield from (Problem((*where, "template", "spec", *p), text)
                    for p, text in pod_problems(group, group is head))  # fmt: skip


def head_problems(head: Any) -> Iterator[Problem]:
    """What is wrong with KubeRay's head, besides its pod."""
    service = _below(head, "headService", "spec")
    types = (_below(head, "serviceType"), _below(service, "type"))
    outside = any(kind not in (None, "ClusterIP") for kind in types)
    if outside or _below(service, "externalIPs") or head.get("enableIngress"):
        yield Problem((), "the dashboard is open beyond the cluster; take serviceType: ClusterIP "
                      "and no ingress")  # fmt: skip
    cpus = _below(head, "resources", "CPU") or _below(head, "rayStartParams", "num-cpus")
    if str(cpus) != "0":
        text = 'the head takes work, which dies with it or starves it; set num-cpus: "0"'
        yield Problem(("rayStartParams",), text)


def pod_problems(group: Any, is_head: bool) -> Iterator[Problem]:
    """What is wrong with the pods of a group."""
    pod = _below(group, "template", "spec")
    containers = _below(pod, "containers") or ()
    for number, each in enumerate(containers):
        if why := unpinned(_below(each, "image")):
            yield Problem(("containers", number, "image"), why)
    spot = _is_on_spot(pod)
    limits = [name for each in containers for name in _below(each, "resources", "limits") or ()]
    if is_head and spot:
        yield Problem(("nodeSelector",), SPOT_HEAD)
    elif not is_head and not spot and any(str(name).endswith("/gpu") for name in limits):
        yield Problem(("nodeSelector",), not_spot("kuberay"))


def _is_on_spot(pod: Any) -> bool:
    """Whether a pod can be on spot nodes alone. One of an affinity's terms is enough for a node, so
    each has to ask for it."""
    chosen = _below(pod, "nodeSelector") or {}
    if any(chosen.get(label) == values[0] for label, values in CAPACITIES.items()):
        return True
    terms = _below(pod, "affinity", "nodeAffinity", REQUIRED, "nodeSelectorTerms")
    return bool(terms) and all(map(_asks_for_spot, terms))


def _asks_for_spot(term: Any) -> bool:
    asked = [
        (CAPACITIES[each["key"]], each["operator"], each.get("values"))
        for each in _below(term, "matchExpressions") or ()
        if each["key"] in CAPACITIES
    ]
    return any(
        (operator == "In" and values == [known[0]])
        # a label that only spot nodes have
        or (operator == "Exists" and len(known) == 1)
        for known, operator, values in asked
    )


# What KubeRay adds to the labels of a head.
HEAD_LABELS = {"ray.io/node-type": "head", "ray.io/is-ray-node": "yes"}


def guarded(head: Any, tree: Any, policies: Sequence[Any]) -> bool:
    """Whether only some may reach the head. Policies add up: one that lets all in is enough."""
    labels = HEAD_LABELS | (_below(head, "template", "metadata", "labels") or {})
    names = [_below(each, "metadata", "namespace") or "default" for each in (tree, *policies)]
    asked = [
        policy["spec"]
        for policy, name in zip(policies, names[1:], strict=True)
        if name == names[0] and _selects(policy["spec"]["podSelector"], labels)
    ]
    asked = [spec for spec in asked if "Ingress" in (spec.get("policyTypes") or ["Ingress"])]
    rules = [rule for spec in asked for rule in spec.get("ingress") or ()]
    return bool(asked) and not any(_lets_all_in(rule) for rule in rules)


def _selects(selector: Any, labels: Mapping[str, Any]) -> bool:
    """Whether it is sure that a selector takes what has these labels."""
    asked = selector.get("matchLabels") or {}
    return not selector.get("matchExpressions") and asked.items() <= labels.items()


def _lets_all_in(rule: Any) -> bool:
    peers = rule.get("from")
    return not peers or any(
        re.search(r"/[0-7]$", str(_below(peer, "ipBlock", "cidr")))
        or (peer.get("namespaceSelector") == {} and not peer.get("podSelector"))
        for peer in peers
    )


def ray_problem(path: Path) -> Iterator[Problem]:
    """What Ray's own validation says."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    logging.getLogger("ray").setLevel(logging.ERROR)  # it tells what it fills in
    try:
        validate_config(prepare_config(yaml.safe_load(path.read_text())))
    except Exception as error:  # of many kinds, and all of them mean that Ray refuses the file
        text = getattr(error, "message", "") or str(error)
        where = tuple(getattr(error, "absolute_path", ()))
        yield Problem(where, f"Ray refuses it: {text.strip().splitlines()[0]}")


# ------------------------------------------------------------------------------------------ files


def documents(text: str) -> list[Document]:
    """The documents of a file; aliases have the lines of what they stand for."""
    trees = list(yaml.safe_load_all(text))
    nodes = yaml.compose_all(text, yaml.SafeLoader)
    return [
        Document(t, dict(_lines(n)), list(_repeated(n))) for t, n in zip(trees, nodes, strict=True)
    ]


def _lines(node: Any, path: Place = ()) -> Iterator[tuple[Place, int]]:
    yield path, node.start_mark.line + 1
    for name, first, value in _below_node(node):
        yield from _lines(value, (*path, name))
        yield (*path, name), first.start_mark.line + 1


def _repeated(node: Any, path: Place = ()) -> Iterator[Problem]:
    seen: dict[str | int, int] = {}
    for name, first, value in _below_node(node):
        if name in seen:
            yield Problem((*path, name), f"was already given on line {seen[name]}")
        seen[name] = first.start_mark.line + 1
        yield from _repeated(value, (*path, name))


def _below_node(node: Any) -> list[tuple[str | int, Any, Any]]:
    """Names of what is below, the nodes that they begin with, and the nodes of their values."""
    if isinstance(node, yaml.MappingNode):
        return [(key.value, key, value) for key, value in node.value]
    if isinstance(node, yaml.SequenceNode):
        return [(number, value, value) for number, value in enumerate(node.value)]
    return []


def problems(path: Path) -> list[tuple[int, Problem]]:
    """All that is wrong with a file, by line."""
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        return [(line, Problem((), f"this is not UTF-8: {error.reason}"))]
    if path.suffix == ".sh":
        return list(_of_script(text)) or _of_nothing(any(ray_starts(text)))
    try:
        found = [each for each in documents(text) if each.tree is not None]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or str(error)
        return [((mark.line + 1) if mark else 1, Problem((), f"this is not YAML: {said}"))]
    policies = [each.tree for each in found if _below(each.tree, "kind") == "NetworkPolicy"]
    policies = [tree for tree in policies if not list(wrong_keys(tree, NETWORK_POLICY))]
    told = [(_line(each, p), p) for each in found for p in each.repeated]
    told += [(_line(each, p), p) for each in found for p in _of_document(each.tree, policies, path)]
    told += _of_nothing(not all(_is_foreign(each.tree) for each in found))
    return sorted(set(told), key=lambda pair: (pair[0], str(pair[1])))


def _of_nothing(starts: bool) -> list[tuple[int, Problem]]:
    return [] if starts else [(1, Problem((), "nothing in this file starts Ray"))]


def _is_foreign(tree: Any) -> bool:
    """Whether a document is a manifest of Kubernetes' own."""
    kind, version = _below(tree, "kind"), str(_below(tree, "apiVersion"))
    return kind is not None and str(kind) not in MANIFESTS and not version.startswith("ray.io")


def _of_document(tree: Any, policies: Sequence[Any], path: Path) -> Iterator[Problem]:
    kind = _below(tree, "kind")
    if _is_foreign(tree):
        yield from wrong_keys(tree, NETWORK_POLICY) if kind == "NetworkPolicy" else ()
    elif str(kind) in MANIFESTS:
        found = list(wrong_keys(tree, MANIFESTS[kind]))
        yield from found
        if not _misshapen(found):
            yield from manifest_problems(tree, policies)
    else:
        provider = _below(tree, "provider", "type")
        if not isinstance(provider, str) or provider not in PROVIDERS:
            known = [*PROVIDERS, *MANIFESTS]
            told = kind if kind is not None else provider
            text = f"{told!r} is none of {', '.join(known)}{nearest(str(told), known)}"
            yield Problem((), f"neither a launcher's file nor a known manifest: {text}")
            return
        found = list(wrong_keys(tree, launcher_keys(tree)))
        yield from found
        if not _misshapen(found):
            yield from launcher_problems(tree)
        yield from ray_problem(path)


def _misshapen(found: Sequence[Problem]) -> bool:
    """Whether a part is no mapping or list where it should be: then nothing more can be said."""
    return any(problem.text.startswith("expected") for problem in found)


def _of_script(text: str) -> Iterator[tuple[int, Problem]]:
    for start in ray_starts(text):
        for why in start_problems(start, None, may_work=False):
            yield start.line, Problem((), why)
    for command in filter(installs_old_rclone, commands(text)):
        yield command.line, Problem((), OLD_RCLONE)


def _line(document: Document, problem: Problem) -> int:
    path = problem.path
    while path and path not in document.lines:
        path = path[:-1]
    return document.lines.get(path, 1)


def main(paths: Sequence[str]) -> int:
    """Tell all problems of all files; 1 if there are any, 2 without a file."""
    if not paths:
        print("error: give the files to check, as in cluster/aws.yaml", file=sys.stderr)
        return 2
    count = 0
    for name in paths:
        if not Path(name).is_file():
            print(f"error: there is no file {name}", file=sys.stderr)
            return 2
        for line, problem in problems(Path(name)):
            where = ".".join(map(str, problem.path))
            print(f"{name}:{line}: {where}{': ' if where else ''}{problem.text}")
            count += 1
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

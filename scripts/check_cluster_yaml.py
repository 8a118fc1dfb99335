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
from cluster_keys import MANIFESTS, PROVIDERS, Place, Problem, launcher_keys, wrong_keys

from bitray.settings import nearest

LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Document(NamedTuple):
    """A YAML document, and the line on which each of its paths begins."""

    tree: Any
    lines: Mapping[Place, int]


def unpinned(image: object) -> str | None:
    """Why an image may be another one tomorrow."""
    name, _, digest = str(image).partition("@")
    tag = name.rpartition("/")[2].partition(":")[2]
    if digest or (tag and not re.search(r"latest|nightly|master|main", tag)):
        return None
    return f"{image} is not pinned; name a version, as in rayproject/ray:2.60.0-py311-gpu"


def command_problems(command: str, head: bool, token: str | None, takes_work: bool) -> list[str]:
    """What is wrong with a command that starts Ray. `token`: the file that is mounted."""
    found = []
    if not re.search(r"\bRAY_AUTH_MODE=token\b", command):
        found.append("RAY_AUTH_MODE=token is not exported before ray start, so anybody may submit")
    said = re.search(r"RAY_AUTH_TOKEN_PATH=(\S+?)[;\s]", command)
    path = said.group(1) if said else "~/.ray/auth_token"
    if token is not None and path != token:
        found.append(f"Ray will read its token from {path}, but it is mounted at {token}")
    host = re.search(r"--dashboard-host[= ]\s*([^\s;]+)", command)
    if host and host.group(1) not in LOOPBACK:
        found.append(f"the dashboard listens on {host.group(1)}; take 127.0.0.1 and ssh to it")
    if head and takes_work:
        found.append("the head takes work, which dies with it or starves it; add --num-cpus=0")
    return found


def launcher_problems(tree: Any) -> Iterator[Problem]:
    """What is wrong with a launcher's file that its keys do not show."""
    tokens = [
        path for path in map(str, tree.get("file_mounts") or {}) if path.endswith("auth_token")
    ]
    if not tokens:
        yield Problem(("file_mounts",), "no token is mounted; add /home/ray/.ray/auth_token: "
                      "~/.ray/auth_token, which `ray get-auth-token --generate` makes")  # fmt: skip
    local = tree["provider"]["type"] == "local"
    workers = tree["provider"].get("worker_ips") if local else tree.get("max_workers", 1)
    for key in ("head_start_ray_commands", "worker_start_ray_commands"):
        commands = list(tree.get(key) or ())
        starts = [(n, str(c)) for n, c in enumerate(commands) if "ray start" in str(c)]
        if not starts:
            yield Problem((key,), "nothing starts Ray here, or Ray's default does, without a token")
        for number, command in starts:
            head = "--head" in command
            free = not local or not workers or "--num-cpus=0" in command
            texts = command_problems(command, head, tokens[0] if tokens else None, not free)
            yield from (Problem((key, number), text) for text in texts)
    for number, rule in enumerate(
        _below(tree, "provider", "security_group", "IpPermissions") or ()
    ):
        wide = "0.0.0.0/0" in str(rule.get("IpRanges"))
        if wide and rule.get("FromPort") != 22:
            at = ("provider", "security_group", "IpPermissions", number)
            yield Problem(at, "opens more than ssh to the whole world")
    docker = tree.get("docker") or {}
    for key in ("image", "head_image", "worker_image"):
        if key in docker and (why := unpinned(docker[key])):
            yield Problem(("docker", key), why)
    if not local:
        yield from node_problems(tree)


def node_problems(tree: Any) -> Iterator[Problem]:
    """What is wrong with the machines of a cloud."""
    types, head = tree.get("available_node_types") or {}, tree.get("head_node_type")
    if head is not None and head not in types:
        at = ("head_node_type",)
        yield Problem(at, f"there is no node type {head}{nearest(str(head), types)}")
    for name, node in types.items():
        at, machine = ("available_node_types", name), node.get("node_config") or {}
        spot = _is_spot(tree["provider"]["type"], machine)
        if name == head:
            busy = {
                k: v for k, v in (node.get("resources") or {}).items() if k in ("CPU", "GPU") and v
            }
            if busy or "CPU" not in (node.get("resources") or {}):
                text = "the head takes work, which dies with it or starves it; set CPU: 0, no GPU"
                yield Problem((*at, "resources"), text)
            if spot:
                yield Problem((*at, "node_config"), "a spot head takes the cluster with it when "
                              "it goes; take it on demand")  # fmt: skip
        elif (node.get("resources") or {}).get("GPU") and not spot:
            how = SPOT[tree["provider"]["type"]]
            text = f"these GPUs are not spot ones, at two or three times the price; say {how}"
            yield Problem((*at, "node_config"), text)


SPOT = {
    "aws": "InstanceMarketOptions: {MarketType: spot}",
    "gcp": "scheduling: {provisioningModel: SPOT}",
    "azure": "azure_arm_parameters.priority: Spot",
}
"""How each cloud spells it."""


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


def manifest_problems(tree: Any, guarded: bool) -> Iterator[Problem]:
    """What is wrong with a KubeRay manifest that its keys do not show. `guarded`: the file has a
    NetworkPolicy, behind which a RayJob's dashboard may be asked by the operator."""
    job = tree["kind"] == "RayJob"
    at: Place = ("spec", "rayClusterSpec") if job else ("spec",)
    cluster = _below(tree, *map(str, at)) or {}
    head = cluster.get("headGroupSpec") or {}
    start = head.get("rayStartParams") or {}
    host = start.get("dashboard-host", "0.0.0.0")  # KubeRay's default
    if host not in LOOPBACK and not (job and guarded):
        needs = "a NetworkPolicy in the same file" if job else "127.0.0.1 and kubectl port-forward"
        where = (*at, "headGroupSpec", "rayStartParams")
        yield Problem(where, f"the dashboard listens on {host}; it needs {needs}")
    if head.get("serviceType", "ClusterIP") != "ClusterIP" or head.get("enableIngress"):
        yield Problem((*at, "headGroupSpec"), "the dashboard is open beyond the cluster; take "
                      "serviceType: ClusterIP and no ingress")  # fmt: skip
    cpus = _below(head, "resources", "CPU") or start.get("num-cpus")
    if str(cpus) != "0":
        text = 'the head takes work, which dies with it or starves it; set num-cpus: "0"'
        yield Problem((*at, "headGroupSpec", "rayStartParams"), text)
    groups = [("headGroupSpec", head)]
    groups += [(n, group) for n, group in enumerate(cluster.get("workerGroupSpecs") or ())]
    for name, group in groups:
        where = (*at, name) if isinstance(name, str) else (*at, "workerGroupSpecs", name)
        for number, each in enumerate(_below(group, "template", "spec", "containers") or ()):
            if why := unpinned(each.get("image")):
                yield Problem((*where, "template", "spec", "containers", number, "image"), why)


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
    return [Document(t, dict(_lines(n))) for t, n in zip(trees, nodes, strict=True)]


def _lines(node: Any, path: Place = ()) -> Iterator[tuple[Place, int]]:
    yield path, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            below = (*path, key.value)
            yield from _lines(value, below)
            yield below, key.start_mark.line + 1
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _lines(value, (*path, number))


def problems(path: Path) -> list[tuple[int, Problem]]:
    """All that is wrong with a file, by line."""
    text = path.read_text()
    if path.suffix == ".sh":
        return list(_of_script(text))
    try:
        found = documents(text)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        said = getattr(error, "problem", None) or str(error)
        return [((mark.line + 1) if mark else 1, Problem((), f"this is not YAML: {said}"))]
    guarded = any(_below(each.tree, "kind") == "NetworkPolicy" for each in found)
    told = [(_line(each, p), p) for each in found for p in _of_document(each.tree, guarded, path)]
    return sorted(set(told), key=lambda pair: (pair[0], str(pair[1])))


def _of_document(tree: Any, guarded: bool, path: Path) -> Iterator[Problem]:
    kind = _below(tree, "kind")
    if isinstance(kind, str) and kind in MANIFESTS:
        found = list(wrong_keys(tree, MANIFESTS[kind]))
        yield from found
        if not _misshapen(found):
            yield from manifest_problems(tree, guarded)
    elif kind is None or str(_below(tree, "apiVersion")).startswith("ray.io"):
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
    exported = "RAY_AUTH_MODE=token" if re.search(r"export .*RAY_AUTH_MODE=token", text) else ""
    for match in re.finditer(r"\bray\"? start\b(?:[^\n]*\\\n)*[^\n]*", text):
        command, head = match.group(), "--head" in match.group()
        work = head and "--num-cpus=0" not in command
        for why in command_problems(f"{exported} {command}", head, None, work):
            yield text.count("\n", 0, match.start()) + 1, Problem((), why)


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

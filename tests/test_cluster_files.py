"""The files of `cluster/`, and the linter that finds what Ray's own validator lets pass."""

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import check_cluster_yaml as linter
import kubernetes_validate
import pytest
import yaml
from cluster_keys import MANIFESTS, launcher_keys
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).parent.parent
CLUSTER = ROOT / "cluster"
CLOUDS = [CLUSTER / f"{name}.yaml" for name in ("aws", "gcp", "azure")]
LAUNCHED = [*CLOUDS, CLUSTER / "local.yaml", CLUSTER / "on_prem.yaml"]
KUBERAY = [CLUSTER / "kuberay" / f"{name}.yaml" for name in ("raycluster", "rayjob")]
FILES = [*LAUNCHED, *KUBERAY, CLUSTER / "slurm.sh"]
Tree = Any


def name(path: Path) -> str:
    return path.stem


def told(folder: Path, trees: list[Tree] | str, suffix: str = ".yaml") -> list[str]:
    """What the linter says of documents, or of a text."""
    path = folder / f"cluster{suffix}"
    path.write_text(trees if isinstance(trees, str) else yaml.safe_dump_all(trees))
    return [f"{'.'.join(map(str, p.path))}: {p.text}" for _, p in linter.problems(path)]


def trees(path: Path) -> list[Tree]:
    # copied, so that what aliases stand for can be changed in one place alone
    return [
        yaml.safe_load(yaml.dump(t, Dumper=Plain)) for t in yaml.safe_load_all(path.read_text())
    ]


class Plain(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def below(tree: Tree, path: str) -> Tree:
    for key in path.split(".") if path else ():
        tree = tree[int(key)] if isinstance(tree, list) else tree[key]
    return tree


def changed(path: Path, where: str, value: Any) -> list[Tree]:
    """A file's documents, the last of which has another value; `...` takes it away."""
    found = trees(path)
    put(found[-1], where, value)
    return found


def put(tree: Tree, where: str, value: Any) -> None:
    head, _, last = where.rpartition(".")
    parent = below(tree, head)
    if value is ...:
        del parent[last]
    else:
        parent[int(last) if isinstance(parent, list) else last] = value


# ------------------------------------------------------------------------------------- our files


@pytest.mark.parametrize("path", FILES, ids=name)
def test_our_files_are_right(path: Path) -> None:
    assert linter.problems(path) == []


@pytest.mark.parametrize("path", CLOUDS, ids=name)
def test_clouds_scale_from_nothing_on_spot_machines_with_disks_labels_and_tags(path: Path) -> None:
    tree = trees(path)[0]
    assert 0 < tree["idle_timeout_minutes"] <= 15
    types = tree["available_node_types"]
    assert {t["labels"]["role"] for t in types.values()} == {"head", "train", "data"}
    for each, node in types.items():
        assert each == "head" or node["min_workers"] == 0
        assert "bitray" in str(node["node_config"]), "tagged"
        sizes = [v for k, v in leaves(node) if k in ("VolumeSize", "diskSizeGb", "osDiskSize")]
        assert sizes and min(sizes) >= 100
    assert "GPU" not in types["data"]["resources"]
    assert any("rclone mount :" in line for line in tree["initialization_commands"])


@pytest.mark.parametrize("path", KUBERAY, ids=name)
def test_kubernetes_scales_from_nothing(path: Path) -> None:
    spec = trees(path)[-1]["spec"]
    spec = spec.get("rayClusterSpec", spec)
    groups = {group["groupName"]: group for group in spec["workerGroupSpecs"]}
    assert all(group["minReplicas"] == group["replicas"] == 0 for group in groups.values())
    limits = [v for k, v in leaves(groups["gpu"]) if k == "nvidia.com/gpu"]
    assert limits and not [k for k, _ in leaves(groups["data"]) if k == "nvidia.com/gpu"]
    disks = [int(v.removesuffix("Gi")) for k, v in leaves(spec) if k == "ephemeral-storage"]
    assert min(disks) >= 100


@pytest.mark.parametrize("path", KUBERAY, ids=name)
def test_kubernetes_knows_every_field(path: Path) -> None:
    """By the schema of Kubernetes' own API, what KubeRay hands on to it included."""
    asked = []
    for tree in trees(path):
        spec = tree["spec"].get("rayClusterSpec", tree["spec"])
        if "headGroupSpec" not in spec:
            asked.append(tree)
            continue
        templates = [
            group["template"] for group in [spec["headGroupSpec"], *spec["workerGroupSpecs"]]
        ]
        asked += [{"apiVersion": "v1", "kind": "Pod", **template} for template in templates]
    assert len(asked) > 3
    version = kubernetes_validate.latest_version()
    for each in asked:
        kubernetes_validate.validate(each, version, strict=True)
    asked[-1]["spec"]["containers"][0]["imagee"] = "x"
    with pytest.raises(kubernetes_validate.ValidationError, match="imagee"):
        kubernetes_validate.validate(asked[-1], version, strict=True)


def leaves(tree: Tree) -> Iterator[tuple[str, Any]]:
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
        if isinstance(value, dict | list):
            yield from leaves(value)
        else:
            yield str(key), value


def test_the_image_and_the_files_are_of_the_same_versions() -> None:
    """A node of another Ray does not join."""
    pinned = (ROOT / "constraints.txt").read_text()
    version = next(line for line in pinned.splitlines() if line.startswith("ray==")).partition(
        "=="
    )[2]
    image = (CLUSTER / "Dockerfile").read_text()
    assert f"FROM rayproject/ray:{version}-py311" in image
    for path in KUBERAY:
        assert f"rayVersion: {version}" in path.read_text()


SLURM = {  # what stands in for Slurm's own commands and for the environment's
    "scontrol": "echo node0",
    "srun": 'printf "%s\\n" "$1 $2" >> "$LOG"; shift 2; exec "$@"',
    "rclone": 'printf "rclone %s\\n" "$*" >> "$LOG"',
    "fusermount3": "exit 1",
    "ray": '[ "$1" != start ] || printf "%s\\n" "$RAY_AUTH_MODE $*" >> "$LOG"',
    "python": 'until [ "$(grep -c "^token start" "$LOG")" = 3 ]; do sleep 0.05; done; '
              'printf "driver %s\\n" "$RAY_ADDRESS $*" >> "$LOG"; exit 7',
}  # fmt: skip


def test_slurm_starts_a_head_trainers_and_data_workers_beside_a_mount(tmp_path: Path) -> None:
    for command, text in SLURM.items():
        (tmp_path / command).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / command).chmod(0o755)
    script = (CLUSTER / "slurm.sh").read_text().replace("/tmp/bitray-data", f"{tmp_path}/data")
    (tmp_path / "slurm.sh").write_text(script)
    log = tmp_path / "log"
    nodes = {f"SLURM_JOB_NUM_NODES_HET_GROUP_{n}": c for n, c in enumerate("121")}
    given = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "LOG": str(log),
        "HOME": str(tmp_path),
        "PYTHON": f"{tmp_path}/python",
        "SLURM_JOB_NODELIST_HET_GROUP_0": "node0",
    }
    done = subprocess.run(["bash", tmp_path / "slurm.sh", "jobs/pretrain.py", "a=b"],
                          env=given | nodes, check=False, timeout=60)  # fmt: skip
    assert done.returncode == 7, "that of the driver"
    lines = log.read_text().splitlines()
    assert lines[-1] == "driver node0:6379 jobs/pretrain.py a=b"
    assert (tmp_path / "data").is_dir()
    mounts = (
        f"rclone mount :s3,provider=AWS,env_auth:bitray-data {tmp_path}/data --read-only --daemon"
    )
    assert lines.count(mounts) == 3
    steps = [line for line in lines if line.startswith("--het-group")]
    assert sorted(steps) == [f"--het-group={n} --ntasks={c}" for n, c in enumerate("121")]
    starts = sorted(line for line in lines if line.startswith("token start"))
    join = "token start --address=node0:6379 --labels=role="
    assert starts[:2] == [f"{join}data --block", f"{join}train --block"]
    assert "--head" in starts[2] and "--num-cpus=0 --labels=role=head" in starts[2]


# -------------------------------------------------------------------------------------- mistakes

AWS, GCP, AZURE, LOCAL, ON_PREM = (CLUSTER / f"{n}.yaml" for n in
                                   ("aws", "gcp", "azure", "local", "on_prem"))  # fmt: skip
GPU = "available_node_types.gpu"
NODE = f"{GPU}.node_config"
HEAD = "available_node_types.head"
RULE = "provider.security_group.IpPermissions.0"
WORLD = [{"CidrIp": "0.0.0.0/0"}]
RAY_CLUSTER, RAY_JOB = KUBERAY
START = "export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=/home/ray/.ray/auth_token; ray start --head"


@pytest.mark.parametrize(
    ("path", "where", "value", "said"),
    [
        (AWS, "idle_timeout_minute", 5, "no such key (nearest: 'idle_timeout_minutes'"),
        (AWS, "provider.regoin", "x", "provider.regoin: there is no such key (near"),
        (AWS, f"{NODE}.InstanceTyp", "x", "nearest: 'InstanceType'"),
        (AWS, f"{NODE}.InstanceMarketOptions", {"MarketTyp": "spot"}, "nearest: 'MarketType'"),
        (AWS, f"{NODE}.InstanceMarketOptions", {"MarketType": "Spot"}, "'Spot' is none of"),
        (AWS, f"{NODE}.InstanceMarketOptions", ..., "not spot ones"),
        (AWS, f"{NODE}.BlockDeviceMappings.0.Ebs.VolumSize", 1, "nearest: 'VolumeSize'"),
        (AWS, f"{HEAD}.node_config.InstanceMarketOptions", {"MarketType": "spot"}, "a spot head"),
        (AWS, f"{HEAD}.resources", {"CPU": 8}, "the head takes work"),
        (AWS, f"{HEAD}.resources", {}, "the head takes work"),
        (AWS, "head_node_type", "haed", "there is no node type haed (nearest: 'head'"),
        (AWS, "file_mounts", {}, "no token is mounted"),
        (AWS, "file_mounts", {"/srv/ray/auth_token": "~/t"}, "but it is mounted at /srv/ray"),
        (AWS, "docker.image", "rayproject/ray", "is not pinned"),
        (AWS, "docker.image", "host:5000/ray:latest", "is not pinned"),
        (AWS, "docker.worker_image", "rayproject/ray:nightly-gpu", "is not pinned"),
        (AWS, "head_start_ray_commands", ["ray start --head"], "RAY_AUTH_MODE=token is not"),
        (AWS, "head_start_ray_commands.1", f"{START} --dashboard-host=0.0.0.0", "on 0.0.0.0"),
        (AWS, "head_start_ray_commands.1", f"{START} --dashboard-host 10.0.0.3", "10.0.0.3"),
        (AWS, "worker_start_ray_commands", ["ray start --address=x"], "RAY_AUTH_MODE=token is not"),
        (AWS, "worker_start_ray_commands", ..., "worker_start_ray_commands is missing"),
        (AWS, RULE, {"FromPort": 8265, "ToPort": 8265, "IpRanges": WORLD}, "opens more"),
        (AWS, RULE, {"FromPort": 22, "ToPort": 9000, "IpRanges": WORLD}, "opens more"),
        (AWS, RULE, {"IpProtocol": "-1", "IpRanges": WORLD}, "opens more"),
        (AWS, RULE, {"FromPort": 8265, "ToPort": 8265, "Ipv6Ranges": [{"CidrIpv6": "::/0"}]},
         "opens more"),
        (AWS, f"{RULE}.ToPrt", 22, "nearest: 'ToPort'"),
        (AWS, f"{RULE}.IpRanges.0.CidrIP", "10.0.0.0/8", "nearest: 'CidrIp'"),
        (AWS, "initialization_commands", ["sudo apt-get install -y fuse3 rclone"], "too old"),
        (AWS, "max_workers", "many", "Ray refuses it"),
        (AWS, f"{GPU}.min_workers", 99, "Ray refuses it"),
        (GCP, "provider.project", "x", "nearest: 'project_id'"),
        (GCP, f"{NODE}.machinetype", "x", "nearest: 'machineType'"),
        (GCP, f"{NODE}.scheduling", [{"preemptable": True}], "nearest: 'preemptible'"),
        (GCP, f"{NODE}.scheduling", {"preemptible": "yes"}, "'yes' is none of True, False"),
        (GCP, f"{NODE}.scheduling", {"provisioningModel": "Spot"}, "none of SPOT"),
        (GCP, f"{NODE}.scheduling", ..., "not spot ones"),
        (GCP, f"{NODE}.disks.0.initializeParams.sourceImage", "projects/x/global/images/family/y",
         "a family's image"),
        (GCP, f"{NODE}.disks.0.initializeParams.diskSizeGB", 9, "nearest: 'diskSizeGb'"),
        (AZURE, "provider.resourcegroup", "x", "nearest: 'resource_group'"),
        (AZURE, f"{NODE}.azure_arm_parameters.vmsize", "x", "nearest: 'vmSize'"),
        (AZURE, f"{NODE}.azure_arm_parameters.priority", "spot", "nearest: 'Spot'"),
        (AZURE, f"{NODE}.azure_arm_parameters.priority", ..., "not spot ones"),
        (AZURE, f"{NODE}.azure_arm_parameters.imageVersion", "latest", "is not pinned"),
        (AZURE, f"{NODE}.azure_arm_parameters.imageVersion", ..., "is not pinned"),
        (ON_PREM, "provider.worker_ip", [], "nearest: 'worker_ips'"),
        (ON_PREM, "head_start_ray_commands.1", START, "add --num-cpus=0"),
        (LOCAL, "head_start_ray_commands.1", f"{START} --dashboard-host=0.0.0.0", "listens on"),
        (RAY_CLUSTER, "spec.authOptions", ..., "authOptions is missing"),
        (RAY_CLUSTER, "spec.authOptions.mode", "disabled", "'disabled' is none of token"),
        (RAY_CLUSTER, "spec.authOptions.mode", ..., "mode is missing"),
        (RAY_CLUSTER, "apiVersion", "ray.io/v1alpha1", "is none of ray.io/v1"),
        (RAY_CLUSTER, "kind", "RayClutser", "nearest: 'RayCluster'"),
        (RAY_CLUSTER, "spec.headGroupSpec.rayStartParams", {"num-cpus": "0"}, "listens on 0.0.0.0"),
        (RAY_CLUSTER, "spec.headGroupSpec.rayStartParams.num-cpus", "8", "the head takes work"),
        (RAY_CLUSTER, "spec.headGroupSpec.serviceType", "LoadBalancer", "open beyond the cluster"),
        (RAY_CLUSTER, "spec.headGroupSpec.serviceType", [], "[] is none of ClusterIP"),
        (RAY_CLUSTER, "spec.headGroupSpec.enableIngress", True, "open beyond the cluster"),
        (RAY_CLUSTER, "spec.headGroupSpec.headService", {"spec": {"type": "LoadBalancer"}},
         "open beyond the cluster"),
        (RAY_CLUSTER, "spec.headGroupSpec.headService", {"spec": {"externalIPs": ["192.0.2.1"]}},
         "open beyond the cluster"),
        (RAY_CLUSTER, "spec.headGroupSpec.headService", {"spec": {"typ": "x"}}, "nearest: 'type'"),
        (RAY_CLUSTER, "spec.headGroupSpec.rayStartParams.num-cpu", "0", "nearest: 'num-cpus'"),
        (RAY_CLUSTER, "spec.workerGroupSpecs.0.rayStartParams.num-gpu", "1", "nearest: 'num-gpus'"),
        (RAY_CLUSTER, "spec.workerGroupSpecs.0.template.spec.nodeSelector",
         {"karpenter.sh/capacity-type": "spott"}, "nearest: 'spot'"),
        (RAY_CLUSTER, "spec.workerGroupSpecs.0.template.spec.nodeSelector",
         {"karpenter.sh/capacity-typ": "spot"}, "not spot ones"),
        (RAY_CLUSTER, "spec.headGroupSpec.template.spec.nodeSelector",
         {"cloud.google.com/gke-spot": "true"}, "a spot head"),
        (RAY_CLUSTER, "spec.workerGroupSpecs.0.minReplica", 0, "nearest: 'minReplicas'"),
        (RAY_CLUSTER, "spec.workerGroupSpecs.1.template.spec.containers.0.image", "ray", "pinned"),
        (RAY_CLUSTER, "spec.workerGroupSpecs.1.template.spec.container", [], "'containers'"),
        (RAY_JOB, "spec.entrypont", "x", "nearest: 'entrypoint'"),
        (RAY_JOB, "spec.submissionMode", "HttpMode", "nearest: 'HTTPMode'"),
        (RAY_JOB, "spec.rayClusterSpec.authOptions", ..., "authOptions is missing"),
    ],
)  # fmt: skip
def test_each_mistake_is_found(
    tmp_path: Path, path: Path, where: str, value: Any, said: str
) -> None:
    found = told(tmp_path, changed(path, where, value))
    assert any(said in line for line in found), found


SPOT = {"key": "karpenter.sh/capacity-type", "operator": "In", "values": ["spot"]}
EITHER = SPOT | {"values": ["spot", "on-demand"]}
GKE = {"key": "cloud.google.com/gke-spot", "operator": "Exists"}
ZONE = {"key": "topology.kubernetes.io/zone", "operator": "In", "values": ["a"]}


@pytest.mark.parametrize(("terms", "spot"), [
    ([[SPOT]], True), ([[ZONE, SPOT], [GKE]], True), ([[ZONE], [SPOT]], False), ([[EITHER]], False),
    ([[SPOT | {"operator": "NotIn"}]], False), ([[SPOT | {"values": ["spott"]}]], False),
    ([], False),
])  # fmt: skip
def test_spot_nodes_may_be_asked_for_by_affinity(
    tmp_path: Path, terms: list[list[dict]], spot: bool
) -> None:
    asked = {"nodeSelectorTerms": [{"matchExpressions": term} for term in terms]}
    affinity = {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": asked}}
    found = trees(RAY_CLUSTER)
    for group in ("headGroupSpec", "workerGroupSpecs.0"):
        put(found[-1], f"spec.{group}.template.spec.nodeSelector", {})
        put(found[-1], f"spec.{group}.template.spec.affinity", affinity)
    lines = told(tmp_path, found)
    assert any("not spot ones" in line for line in lines) == (not spot)
    assert any("a spot head" in line for line in lines) == spot


@pytest.mark.parametrize(("where", "value", "said"), [
    ("nodeAffinty", {}, "nearest: 'nodeAffinity'"),
    ("nodeAffinity", {"requiredDuringSchedulingIgnoredDuringExecutions": {}},
     "nearest: 'requiredDuringSchedulingIgnoredDuringExecution'"),
    ("nodeAffinity", {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [SPOT | {"operator": "in"}]}]}}, "nearest: 'In'"),
    ("nodeAffinity", {"requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [
        {"matchExpressions": [SPOT | {"key": []}]}]}}, "expected a word"),
])  # fmt: skip
def test_a_mistyped_affinity_is_found(tmp_path: Path, where: str, value: Any, said: str) -> None:
    found = trees(RAY_CLUSTER)
    put(found[-1], "spec.workerGroupSpecs.0.template.spec.affinity", {where: value})
    assert any(said in line for line in told(tmp_path, found))


def test_a_dashboard_inside_the_cluster_needs_a_policy(tmp_path: Path) -> None:
    job = trees(RAY_JOB)[-1:]
    assert any("needs a NetworkPolicy" in line for line in told(tmp_path, job))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        ("spec.ingress.0", {}),
        ("spec.ingress.0.from", []),
        ("spec.ingress.0.ports", []),
        ("spec.ingress.0.from.0", {"ipBlock": {"cidr": "0.0.0.0/0"}}),
        ("spec.ingress.0.from.0", {"namespaceSelector": {}}),
        ("spec.podSelector", {"matchLabels": {"project": "other"}}),
        ("spec.podSelector.matchExpressions", [{"key": "x", "operator": "Exists"}]),
        ("spec.policyTypes", ["Egress"]),
        ("spec.ingres", []),
        ("metadata.namespace", "elsewhere"),
    ],
)
def test_a_policy_has_to_keep_strangers_from_the_head(
    tmp_path: Path, where: str, value: Any
) -> None:
    """Where one lets all in, another beside it that does not is no help."""
    *others, job = trees(RAY_JOB)
    for each in others:
        put(each, where, value)
    harmless = where.endswith("ports")
    for documents in ([*others, job], [*others, *trees(RAY_JOB)]):
        opened = any("needs a NetworkPolicy" in line for line in told(tmp_path, documents))
        lets_in = where.startswith("spec.ingress")
        assert opened == (not harmless and (lets_in or len(documents) == 2))


def test_what_is_there_twice_is_told(tmp_path: Path) -> None:
    text = LOCAL.read_text().replace("provider:\n", "provider:\n  type: aws\n")
    text += "auth: {ssh_user: you}\n"
    assert told(tmp_path, text) == [
        "provider.type: was already given on line 8",
        "auth: was already given on line 13",
    ]


@pytest.mark.parametrize("suffix", [".yaml", ".sh"])
@pytest.mark.parametrize("text", ["", "# nothing\n", "\n\n"])
def test_a_file_without_a_cluster_is_not_right(tmp_path: Path, text: str, suffix: str) -> None:
    assert told(tmp_path, text, suffix) == [": nothing in this file starts Ray"]


def test_a_manifest_of_something_else_is_no_cluster(tmp_path: Path) -> None:
    policy = trees(RAY_JOB)[:1]
    assert told(tmp_path, policy) == [": nothing in this file starts Ray"]


@pytest.mark.parametrize("suffix", [".yaml", ".sh"])
def test_a_file_that_is_no_text_has_its_sentence(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"cluster{suffix}"
    path.write_bytes(b"cluster_name: x\ndocker: \xff\xfe\n")
    assert [(line, p.text) for line, p in linter.problems(path)] == [
        (2, "this is not UTF-8: invalid start byte")
    ]


UNSAID, LISTENS = "RAY_AUTH_MODE=token is not exported", "listens on 0.0.0.0"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("RAY_AUTH_MODE=token; ray start", UNSAID),
        ("RAY_AUTH_MODE=token && ray start", UNSAID),
        ("# export RAY_AUTH_MODE=token\nray start", UNSAID),
        ("ray start # export RAY_AUTH_MODE=token", UNSAID),
        ("ray start; export RAY_AUTH_MODE=token", UNSAID),
        ("echo 'export RAY_AUTH_MODE=token'; ray start", UNSAID),
        ("export RAY_AUTH_MODE=token; export RAY_AUTH_MODE=disabled; ray start", UNSAID),
        ("export RAY_AUTH_MODE=token; unset RAY_AUTH_MODE; ray start", UNSAID),
        ("export RAY_AUTH_MODE=token-not; ray start", UNSAID),
        ('bash -c "ray start"', UNSAID),
        ("export RAY_AUTH_MODE=token\nray start --dashboard-host=127.0.0.1 \\\n"
         " --dashboard-host=0.0.0.0", LISTENS),
        ("RAY_AUTH_MODE=token ray start --dashboard-host '0.0.0.0'", LISTENS),
        ("RAY_AUTH_MODE=token ray start --dashboard-host=0.0.0.0 --dashboard-host=127.0.0.1", None),
        ("RAY_AUTH_MODE=token ray start", None),
        ("RAY_AUTH_MODE=token; export RAY_AUTH_MODE; ray start", None),
        ("export RAY_AUTH_MODE='token'  # yes\n$HOME/bin/ray start", None),
        ("export RAY_AUTH_MODE=token; srun bash -c 'echo $#; \"$ray\" start' > log 2>&1 &", None),
        ("env RAY_AUTH_MODE=token ray start", None),
    ],
)  # fmt: skip
def test_a_script_is_read_as_a_shell_reads_it(tmp_path: Path, text: str, said: str | None) -> None:
    found = told(tmp_path, text, ".sh")
    assert [line for line in found if not said or said not in line] == []
    assert bool(found) == bool(said)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("RAY_AUTH_MODE=token", "RAY_AUTH_MODE=", "RAY_AUTH_MODE=token is not exported"),
        ("--dashboard-host=127.0.0.1", "--dashboard-host=0.0.0.0", "listens on 0.0.0.0"),
        ("--num-cpus=0", "", "the head takes work"),
        ("--num-cpus=0", "--num-cpus=0 --num-cpus=8", "the head takes work"),
        ("set -euo", "apt install rclone; set -euo", "too old to mount"),
    ],
)
def test_mistakes_in_a_script_are_found(tmp_path: Path, old: str, new: str, said: str) -> None:
    text = (CLUSTER / "slurm.sh").read_text()
    assert old in text
    assert any(said in line for line in told(tmp_path, text.replace(old, new), ".sh"))


def test_all_mistakes_are_told_at_once_with_their_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = AWS.read_text().replace("region: us-west-2\n", "regoin: us-west-2\n")
    text = text.replace("MarketType: spot", "MarketType: spto").replace(
        "bitray:0.1.0", "bitray:latest"
    )
    (tmp_path / "mine.yaml").write_text(text)
    assert linter.main([str(AWS), str(tmp_path / "mine.yaml")]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert all(line.startswith(f"{tmp_path / 'mine.yaml'}:") for line in lines)
    given = text.splitlines()
    for word, said in (("regoin", "region"), ("spto", "spot"), ("bitray:latest", "pinned")):
        line = next(each for each in lines if word in each and said in each)
        assert word in given[int(line.split(":")[1]) - 1], "the line is where it says"


def test_ray_alone_would_let_them_pass() -> None:
    """Else there were no need for a linter."""
    from ray.autoscaler._private.util import prepare_config, validate_config

    for where, value in ((f"{NODE}.InstanceMarketOption", {"MarketType": "spot"}),
                         ("provider.regoin", "x"), (f"{HEAD}.resources", {"CPU": 8})):  # fmt: skip
        validate_config(prepare_config(changed(AWS, where, value)[0]))


def test_it_is_a_command(tmp_path: Path) -> None:
    def run(*paths: Path) -> int:
        words = [sys.executable, ROOT / "scripts/check_cluster_yaml.py", *paths]
        return subprocess.run(words, cwd=ROOT, capture_output=True, check=False).returncode

    broken = tmp_path / "broken.yaml"
    broken.write_text("provider: {type: aws\n")
    assert run(LOCAL) == 0
    assert run(LOCAL, broken) == 1
    assert run() == run(tmp_path / "none.yaml") == 2


# ------------------------------------------------------------------------------------- properties


def keys_of(tree: Tree, table: Any, at: str = "") -> Iterator[tuple[str, bool]]:
    """Paths whose last key is not of the user's choice, and whether it has to be there."""
    table = table() if callable(table) else table
    if isinstance(table, list) and isinstance(tree, list):
        for number, each in enumerate(tree):
            yield from keys_of(each, table[0], f"{at}{number}.")
    elif isinstance(table, dict) and isinstance(tree, dict):
        known = {key.rstrip("!"): (below, key.endswith("!")) for key, below in table.items()}
        for key, value in tree.items():
            inner, needed = known.get(key, (table.get("*"), False))
            if "*" not in table:
                yield f"{at}{key}", needed
            yield from keys_of(value, inner, f"{at}{key}.")


def table_of(tree: Tree) -> Any:
    return MANIFESTS[tree["kind"]] if "kind" in tree else launcher_keys(tree)


ALL_KEYS = [(path, *pair) for path in [*LAUNCHED, *KUBERAY]
            for pair in keys_of(trees(path)[-1], table_of(trees(path)[-1]))]  # fmt: skip


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.sampled_from(ALL_KEYS), st.data())
def test_any_key_that_is_mistyped_is_found(
    tmp_path: Path, chosen: Any, data: st.DataObject
) -> None:
    path, where, _ = chosen
    head, _, key = where.rpartition(".")
    place = data.draw(st.integers(0, len(key)))
    wrong = data.draw(
        st.sampled_from([key[:place] + "x" + key[place:], key[:place] + key[place + 1 :]])
    )
    found = trees(path)
    parent = below(found[-1], head)
    if wrong in parent or wrong == key:
        return
    parent[wrong] = parent.pop(key)
    lines = told(tmp_path, found)
    special = where in ("kind", "provider", "provider.type")  # which say what kind of file it is
    assert any((wrong in line or special) and line for line in lines), (where, wrong, lines)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40)
@given(st.sampled_from([(path, where) for path, where, needed in ALL_KEYS if needed]))
def test_any_key_that_has_to_be_there_is_missed(tmp_path: Path, chosen: tuple[Path, str]) -> None:
    path, where = chosen
    assert told(tmp_path, changed(path, where, ...)), where


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=50)
@given(st.sampled_from(ALL_KEYS), st.sampled_from([None, 3, "word", [], ["a", 1], {}, {"a": None}]))
def test_no_value_makes_it_stumble(tmp_path: Path, chosen: Any, value: Any) -> None:
    path, where, _ = chosen
    told(tmp_path, changed(path, where, copy.deepcopy(value)))

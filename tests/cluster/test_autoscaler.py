"""Ray's autoscaler with its provider that makes nodes on this machine: a run that needs more nodes
than there are waits for them, says so, and trains on them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import psutil
import pytest
from machines import ROOT, TOKEN, wait_for

RAY = str(Path(sys.executable).parent / "ray")
HEAD_ID = "f" * 51 + "00000"
PORT = 6401
PROVIDER = "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider"
"""By its name: as a type of its own, Ray asks for an example that its wheels have not."""
COMMANDS = (
    "setup_commands", "initialization_commands", "head_setup_commands", "worker_setup_commands",
    "head_start_ray_commands", "worker_start_ray_commands",
)  # fmt: skip


@pytest.fixture(params=["1", "0"], ids=["second", "first"])
def environment(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    """Of processes that use a cluster of a head, to which two nodes may come, by Ray's second
    autoscaler or by its first."""
    folder = Path(f"/tmp/bra{os.getpid()}{request.param}")  # short, for Ray's sockets
    folder.mkdir()
    host = "127.0.0.1"
    config = {
        "cluster_name": "fake", "max_workers": 2, "idle_timeout_minutes": 1,
        "upscaling_speed": 100.0,
        "provider": {
            "type": "external", "module": PROVIDER,
            "use_node_id_as_ip": True, "launch_multiple": True,
            "disable_node_updaters": True, "disable_launch_config_check": True,
            "foreground_node_launch": True, "head_node_id": HEAD_ID,
            "gcs_address": f"{host}:{PORT}",
        },
        "auth": {}, "docker": {}, "file_mounts": {}, "cluster_synced_files": [],
        "file_mounts_sync_continuously": False, "rsync_exclude": [], "rsync_filter": [],
        **{key: [] for key in COMMANDS}, "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 1}, "node_config": {}, "max_workers": 0},
            "worker": {
                "resources": {"CPU": 1, "trainer": 1, "object_store_memory": 150_000_000},
                "labels": {"role": "train"}, "node_config": {}, "min_workers": 0, "max_workers": 2,
            },
        },
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
    given = kept | {
        "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_TMPDIR": str(folder),
        "PYTHONPATH": str(ROOT), "AUTOSCALER_UPDATE_INTERVAL_S": "1", "RAY_FAKE_CLUSTER": "1",
        "RAY_enable_autoscaler_v2": request.param, "RAY_CLOUD_INSTANCE_ID": HEAD_ID,
    }  # fmt: skip
    log = (folder / "log.txt").open("wb")
    head = subprocess.Popen(
        [
            RAY, "start", "--head", "--block", f"--port={PORT}", f"--node-ip-address={host}",
            f"--autoscaling-config={folder}/config.json", "--num-cpus=1",
            "--include-dashboard=false", "--object-store-memory=150000000",
            "--labels=role=data", "--disable-usage-stats",
        ],
        env=given | {"RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}, stdout=log, stderr=log,
    )  # fmt: skip
    yield given | {"RAY_ADDRESS": f"{host}:{PORT}"}
    for process in [*psutil.Process(head.pid).children(recursive=True), psutil.Process(head.pid)]:
        process.kill()
    head.wait(30)
    for process in psutil.process_iter(["cmdline"]):  # nodes are the autoscaler's children
        if str(folder) in " ".join(process.info["cmdline"] or []):
            process.kill()
    shutil.rmtree(folder, ignore_errors=True)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_run_waits_for_the_autoscaler_and_trains(
    environment: dict[str, str], words: Callable[..., Sequence[str]], tmp_path: Path
) -> None:
    ready = [RAY, "health-check", "--address", environment["RAY_ADDRESS"]]
    wait_for(lambda: subprocess.run(ready, env=environment, check=False).returncode == 0)
    said = [*words(tmp_path.name), "training.influence.enabled=false", "training.max_steps=10"]
    done = subprocess.run(
        [sys.executable, "jobs/pretrain.py", *said],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    assert "waits up to 600 s: an autoscaler may bring nodes" in done.stdout
    assert "begins, step 0/10, 2 workers" in done.stdout
    second = environment["RAY_enable_autoscaler_v2"] == "1"  # it tells that it gives up
    patience = 600 if second else 5
    said = ["scaling.num_workers=5", f"scaling.patience_seconds={patience}"]
    too_many = [*words(f"{tmp_path.name}_many"), *said]
    refused = subprocess.run(
        [sys.executable, "jobs/pretrain.py", *too_many],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert refused.returncode == 2 and "needs 5 workers of 1 CPU" in refused.stderr
    assert f"waits up to {patience} s: an autoscaler may bring nodes" in refused.stdout

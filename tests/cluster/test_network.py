"""Two network hosts of our own: the cable between them is cut in mid-run, and put back."""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import psutil
import pytest
from machines import ROOT, TOKEN, wait_for

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(1200)]
ADDRESSES, PORT = ("10.231.77.1", "10.231.77.2"), 6399
RAY = str(Path(sys.executable).parent / "ray")


class Hosts:
    """Two network namespaces joined by a cable, with a node of a Ray cluster in each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.names = [f"br{os.getpid()}a", f"br{os.getpid()}b"]
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = kept | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_TMPDIR": str(folder),
            "RAY_health_check_period_ms": "1000", "RAY_health_check_timeout_ms": "3000",
            "RAY_health_check_initial_delay_ms": "2000", "GLOO_SOCKET_IFNAME": "cable",
            "PYTHONPATH": str(ROOT),
        }  # fmt: skip
        self.nodes: list[subprocess.Popen[bytes] | None] = [None, None]
        for name in self.names:
            self.ip("netns", "add", name)
        self.ip("link", "add", "cable", "netns", self.names[0], "type", "veth",
                "peer", "name", "cable", "netns", self.names[1])  # fmt: skip
        for name, address in zip(self.names, ADDRESSES, strict=True):
            self.ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
            for link in ("lo", "cable"):
                self.ip("-n", name, "link", "set", link, "up")

    def ip(self, *words: str) -> None:
        subprocess.run(["ip", *words], check=True, capture_output=True)

    def on(self, host: int, *command: str, log: str) -> subprocess.Popen[bytes]:
        """Start a command on a host."""
        file = (self.folder / log).open("ab")
        return subprocess.Popen(
            ["ip", "netns", "exec", self.names[host], *command],
            env=self.environment, cwd=ROOT, stdout=file, stderr=file, start_new_session=True,
        )  # fmt: skip

    def start(self, host: int) -> None:
        """Start the host's node."""
        kind = [f"--address={ADDRESSES[0]}:{PORT}"]
        if host == 0:
            kind = ["--head", f"--port={PORT}", "--include-dashboard=false"]
        self.nodes[host] = self.on(
            host, RAY, "start", "--block", *kind, f"--node-ip-address={ADDRESSES[host]}",
            "--num-cpus=2", f"--labels=role={('head', 'other')[host]}",
            "--object-store-memory=150000000", "--disable-usage-stats", log=f"node{host}.txt",
        )  # fmt: skip

    def end(self, host: int) -> None:
        """End the host's node, all of it."""
        node = self.nodes[host]
        if node is None or node.poll() is not None:
            return
        for process in [*psutil.Process(node.pid).children(recursive=True), node]:
            process.kill()
        node.wait(30)

    def cable(self, state: str) -> None:
        """Put the cable `up` or `down`."""
        self.ip("-n", self.names[0], "link", "set", "cable", state)

    def close(self) -> None:
        for host in (1, 0):
            self.end(host)
        for name in self.names:
            pids = subprocess.run(
                ["ip", "netns", "pids", name], capture_output=True, text=True, check=False
            )
            for pid in pids.stdout.split():
                psutil.Process(int(pid)).kill()
            subprocess.run(["ip", "netns", "delete", name], check=False)


@pytest.fixture
def hosts(tmp_path: Path) -> Iterator[Hosts]:
    folder = Path(f"/tmp/brn{os.getpid()}")  # short, for Ray's sockets
    folder.mkdir()
    found = None
    try:
        try:
            found = Hosts(folder)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine makes no network namespaces: {error}")
        found.start(0)
        found.start(1)
        yield found
    finally:
        if found:
            found.close()
        shutil.rmtree(folder, ignore_errors=True)


def test_a_cut_is_noticed_the_run_goes_on_and_takes_the_host_back(
    hosts: Hosts, words: Callable[..., Sequence[str]]
) -> None:
    from road import Road

    from bitray import Config

    said = [
        *words("cut"), "scaling.num_workers=[1, 2]", "scaling.cpus_per_worker=1",
        "scaling.placement=SPREAD", "scaling.worker_labels={}", "scaling.data_labels={role: head}",
        "scaling.hang_seconds=8", "training.influence.enabled=false", "training.max_steps=300",
    ]  # fmt: skip
    found = Road(Config.load(overrides=said))
    hosts.environment["RAY_ADDRESS"] = f"{ADDRESSES[0]}:{PORT}"
    log = hosts.folder / "driver.txt"

    def alive() -> int:
        text = subprocess.run(
            ["ip", "netns", "exec", hosts.names[0], RAY, "status"],
            env=hosts.environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        return text.stdout.count(" node_")

    wait_for(lambda: alive() == 2, why="two nodes")
    driver = hosts.on(0, sys.executable, "jobs/pretrain.py", *said, log="driver.txt")

    try:
        wait_for(lambda: found.reached() >= 12, why=f"step 12: {log.read_text()[-2000:]}")
        assert ", 2 workers" in log.read_text()
        cut, at = time.time(), found.reached()
        hosts.cable("down")
        wait_for(lambda: ", 1 workers" in log.read_text(), why="it goes on alone")
        wait_for(lambda: found.reached() > at + 1, why="a new step")
        print(f"\ncut at step {at}, new step after {time.time() - cut:.1f} s")
        hosts.end(1)
        hosts.cable("up")
        hosts.start(1)
        wait_for(lambda: log.read_text().count(", 2 workers") == 2, why="it takes the host back")
        assert driver.wait(500) == 0, log.read_text()[-3000:]
    finally:
        if driver.poll() is None:
            driver.kill()
    losses = np.array(found.metrics("stage0"))
    steps = [line["step"] for line in found.lines("stage0") if "train/loss" in line]
    assert steps == list(range(1, 301)) and np.isfinite(losses).all()

"""A cluster with a token, as a test drives it: nodes, jobs over HTTP, processes."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parents[2]
TOKEN = "0123456789abcdef" * 4
SECONDS = 600.0
"""Until something has to have happened; machines are crowded."""

OF_RUNS = ("jobs/pretrain.py", "RayTrainWorker", "MixtureActor", "TrainController", "_Queue")
"""Names of the processes that a run has."""


def alive(process: psutil.Process) -> bool:
    """Whether a process is still there, and not only for its parent to look at."""
    try:
        return bool(process.is_running() and process.status() != "zombie")
    except psutil.Error:
        return False


def wait_for(what: Callable[[], Any], seconds: float = SECONDS, why: str = "") -> Any:
    """What `what` gives, once that is true."""
    end = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < end, f"in {seconds:g} s it did not come: {why}"
        time.sleep(0.05)
    return found


class Machines:
    """Nodes on this machine, each with a raylet of its own; the first is the head."""

    def __init__(self, *nodes: dict[str, Any], **variables: str) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="br", dir="/tmp"))  # short, for Ray's sockets
        self.temporary = self.folder / "tmp"
        self.temporary.mkdir()
        kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_")}
        self.environment = kept | {
            "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": TOKEN, "RAY_TMPDIR": str(self.folder),
            "TMPDIR": str(self.temporary),
            "PATH": f"{Path(sys.executable).parent}:{kept['PATH']}",
            "RAY_health_check_initial_delay_ms": "2000", "RAY_health_check_period_ms": "1000",
            "RAY_health_check_timeout_ms": "20000", "RAY_worker_niceness": "0", **variables,
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "nodes.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=self.environment,
            stderr=(self.folder / "log.txt").open("w"),
        )  # fmt: skip
        self.raylets: list[int] = []
        for node in nodes:
            self.add(**node)

    def _say(self, **said: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(said) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        assert answer, (self.folder / "log.txt").read_text()[-3000:]
        found: dict[str, Any] = json.loads(answer)
        return found

    def add(self, **node: Any) -> int:
        """Start a node; its number."""
        head = (
            {}
            if self.raylets
            else {
                "include_dashboard": True,
                "dashboard_port": 0,
                "dashboard_agent_listen_port": None,  # the usual one may be another cluster's
            }
        )
        labels = {**node.pop("labels", {}), "name": f"node{len(self.raylets)}"}
        answer = self._say(
            add={"object_store_memory": 150_000_000, "labels": labels, **head, **node}
        )
        self.raylets.append(answer["pid"])
        self.url, self.address = f"http://{answer['dashboard']}", answer["address"]
        return len(self.raylets) - 1

    def id_of(self, node: int) -> str:
        """What Ray calls a node."""
        nodes = self.get("/api/v0/nodes?detail=1")["data"]["result"]["result"]
        (found,) = [n["node_id"] for n in nodes if n["labels"].get("name") == f"node{node}"]
        return str(found)

    def kill(self, node: int) -> None:
        """SIGKILL all processes of a node."""
        self._say(kill=node)

    def close(self) -> None:
        assert self.process.stdin
        self.process.stdin.close()
        left = psutil.Process(self.process.pid).children(recursive=True)
        try:
            self.process.wait(60)
        finally:
            for process in [*left, psutil.Process()][:-1]:
                if process.is_running():
                    process.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    # ------------------------------------------------------------------------------------- jobs

    def get(self, path: str, token: str | None = TOKEN, data: Any = None) -> Any:
        """What the dashboard answers; `HTTPError` for what it refuses."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        body = None if data is None else json.dumps(data).encode()
        request = urllib.request.Request(self.url + path, body, headers)
        with urllib.request.urlopen(request, timeout=30) as answer:
            return json.load(answer)

    def refusal(self, token: str | None) -> int:
        """The status with which a job is refused that comes with this token."""
        try:
            self.get("/api/jobs/", token, {"entrypoint": "true"})
        except urllib.error.HTTPError as error:
            return error.code
        return 200

    def submit(self, job: str, words: list[str]) -> str:
        """Submit a job by the script for it; its id."""
        done = subprocess.run(
            [
                sys.executable, "scripts/submit.py", "--no-wait", "--address", self.url,
                "--python", sys.executable, job, *words,
            ],
            cwd=ROOT, env=self.environment | {"PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True, timeout=SECONDS, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.split()[-1]

    def status(self, submission: str) -> str:
        return str(self.get(f"/api/jobs/{submission}")["status"])

    def logs(self, submission: str) -> str:
        return str(self.get(f"/api/jobs/{submission}/logs")["logs"])

    def finished(self, submission: str) -> str:
        """Wait until a job has ended; how."""
        over = ("SUCCEEDED", "FAILED", "STOPPED")
        wait_for(lambda: self.status(submission) in over, why=f"end of {submission}")
        return self.status(submission)

    def succeeded(self, submission: str) -> str:
        """Wait until a job has ended well; what it printed."""
        status, logs = self.finished(submission), self.logs(submission)
        assert status == "SUCCEEDED", logs[-4000:]
        return logs

    # -------------------------------------------------------------------------------- processes

    def processes(self, name: str, node: int | None = None) -> list[psutil.Process]:
        """Those of the cluster, or of one node, whose command line has this in it."""
        root = self.process.pid if node is None else self.raylets[node]
        found = []
        for process in psutil.Process(root).children(recursive=True):
            try:
                if name in " ".join(process.cmdline()) and alive(process):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def strike(self, name: str, number: int = 0) -> int:
        """SIGKILL a process by its name."""
        victims = sorted(wait_for(lambda: self.processes(name), why=name), key=lambda p: p.pid)
        victim = victims[number % len(victims)]
        victim.send_signal(signal.SIGKILL)
        return int(victim.pid)

    def clean(self) -> None:
        """Wait until jobs have left nothing behind."""
        end = time.monotonic() + 120
        while found := self.leaks():
            assert time.monotonic() < end, f"still there: {found}"
            time.sleep(0.5)

    def leaks(self) -> list[str]:
        """Actors, placement groups, processes and temporary folders of jobs still there."""
        actors = self.get("/api/v0/actors?limit=10000&detail=1")["data"]["result"]["result"]
        groups = self.get("/api/v0/placement_groups?limit=10000")["data"]["result"]["result"]
        alive = {
            each["class_name"]
            for each in actors
            if each["state"] != "DEAD"
            and (not each["is_detached"] or each["class_name"] == "PlacementGroupCleaner")
        }
        held = [each["state"] for each in groups if each["state"] != "REMOVED"]
        return [*alive, *held, *self.running(), *self.scratch()]

    def running(self) -> list[str]:
        """What of a run has processes that are still there."""
        return [name for name in OF_RUNS if self.processes(name)]

    def scratch(self) -> list[str]:
        """Temporary folders that bitray has made here and not removed."""
        return [str(path.parent) for path in self.temporary.glob("bitray-[0-9]*/*/files")]

"""What a cluster holds and who may reach it, before a run begins."""

import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import ray
from ray import cloudpickle
from ray.train import RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.util.placement_group import placement_group, remove_placement_group

from bitray import Config
from bitray.pipeline import cluster
from bitray.pipeline.cluster import check_dashboard, preflight, room_for_another
from bitray.pipeline.plan import idle_turns, too_large
from bitray.settings import UserError


def placed(*words: str) -> Config:
    return Config.load(overrides=["scaling.cpus_per_worker=0.5", *words])


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_what_fits_is_placed_in_a_second_and_leaves_nothing(
    capsys: pytest.CaptureFixture[str],
) -> None:
    began = time.monotonic()
    preflight(placed("scaling.num_workers=2"))
    assert time.monotonic() - began < 10
    groups = ray.util.placement_group_table().values()
    assert all(group["state"] == "REMOVED" for group in groups)
    assert capsys.readouterr().out == ""
    assert room_for_another(placed().scaling)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["scaling.placement=STRICT_SPREAD"], "placement=STRICT_SPREAD"),
        (["scaling.worker_labels={rack: a}"], "worker_labels={'rack': 'a'}"),
        (["scaling.data_labels={rack: a}"], "data_labels={'rack': 'a'}"),
        (["scaling.cpus_per_worker=4"], "2 workers of 4 CPU"),
        (["scaling.use_gpu=true"], "2 workers of 0.5 CPU, 1 GPU"),
    ],
)
def test_what_no_node_can_hold_is_refused_in_seconds(words: list[str], said: str) -> None:
    began = time.monotonic()
    with pytest.raises(UserError) as refused:
        preflight(placed("scaling.num_workers=2", *words))
    print(f"\nrefused after {time.monotonic() - began:.1f} s")
    assert time.monotonic() - began < 15
    assert said in str(refused.value) and "these nodes cannot hold: 2 CPU" in str(refused.value)


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_waits_for_nodes_that_others_use_but_not_for_ever(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "PREFLIGHT_SECONDS", 1.0)
    others = placement_group([{"CPU": 2}])
    assert others.wait(30)
    with pytest.raises(UserError, match="start more nodes"):
        preflight(placed("scaling.patience_seconds=1"))
    assert "waits up to 1 s: others use the nodes" in capsys.readouterr().out
    threading.Timer(2.0, remove_placement_group, [others]).start()
    preflight(placed("scaling.patience_seconds=60"))
    assert "waits up to 60 s" in capsys.readouterr().out


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_waits_for_what_an_autoscaler_may_bring(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "autoscales", lambda: True)
    with pytest.raises(UserError, match="start more nodes"):
        preflight(placed("scaling.use_gpu=true", "scaling.patience_seconds=1"))
    assert "waits up to 1 s: an autoscaler may bring nodes" in capsys.readouterr().out


def poisoned_worker(config: dict[str, list[str]]) -> list[float]:
    """Four steps, in the third of which the gradients of the last worker are not finite."""
    sys.path += config["path"]
    from test_parallel import poisoned

    found: list[float] = poisoned()["held out"]
    return found


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_all_workers_skip_a_step_that_one_cannot_take(tmp_path: Path) -> None:
    """What the first worker counts, of a step that only the last one could not take."""
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not find this file
    trainer = TorchTrainer(
        poisoned_worker,  # type: ignore[arg-type]
        train_loop_config={"path": sys.path},
        torch_config=TorchConfig(backend="gloo"),
        scaling_config=ScalingConfig(num_workers=2, resources_per_worker={"CPU": 0.5}),
        run_config=RunConfig(name="nan", storage_path=str(tmp_path)),
    )
    assert trainer.fit().return_value[0] == 1


class Open(BaseHTTPRequestHandler):
    status = 200

    def do_GET(self) -> None:
        self.send_response(type(self).status)
        self.end_headers()

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def dashboard() -> Iterator[str]:
    """A server that others than this machine may reach."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # nothing is sent
            host = probe.getsockname()[0]
        except OSError:
            pytest.skip("this machine has no address but loopback")
    server = HTTPServer((host, 0), Open)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"{host}:{server.server_port}"
    server.shutdown()


def test_a_dashboard_open_to_the_network_is_refused(
    dashboard: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="RAY_AUTH_MODE=token"):
        check_dashboard(dashboard)
    monkeypatch.setattr(Open, "status", 401)
    check_dashboard(dashboard)


@pytest.mark.parametrize("url", ["", "127.0.0.1:8265", "localhost:8265", "[::1]:8265"])
def test_loopback_is_nobody_elses(url: str) -> None:
    check_dashboard(url)


def test_a_worker_without_memory_is_told_with_what_to_change() -> None:
    said = too_large(Config.load(), "stage2", 1, 12.5, "tried to allocate 2 GiB")
    assert said.startswith("stage stage2: worker 1 ran out of memory at a peak of 12.5 GB (tried")
    for change in ("training.batch_size (now 4", "activation_checkpointing", "scaling.num_workers"):
        assert change in said
    assert "biggest parts are activations" in said


def test_idle_turns_are_told(configured: Callable[..., Config]) -> None:
    assert idle_turns(configured("any", "scaling.num_workers=3"), "stage2") is None
    said = idle_turns(configured("any", "scaling.num_workers=[1, 2]"), "stage2")
    assert said is not None and "3 micro-batches a step leave 25% of the turns of 2 workers" in said

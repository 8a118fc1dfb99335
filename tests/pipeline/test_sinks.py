"""Sinks that reach outside of the run's folder: Ray's metrics and W&B, both without any account."""

import http.server
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import wandb
from flaky_s3 import FlakyS3
from wandb_file import histories, run_records

from bitray import Config, storage
from bitray.pipeline import sinks
from bitray.pipeline.sinks import RayMetrics, sinks_of, wandb_wanted
from bitray.training.metrics import Console, JsonLines, TensorBoard, WeightsAndBiases


def kinds(config: Config) -> list[type]:
    found = sinks_of(config, "stage0", 0, "an-id", print)
    for sink in found:
        sink.close()
    return [type(sink) for sink in found]


def test_a_key_or_a_wish_brings_wandb_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    assert not wandb_wanted(Config.load())
    assert wandb_wanted(Config.load(overrides=["logging.wandb.enabled=true"]))
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    assert wandb_wanted(Config.load())
    assert not wandb_wanted(Config.load(overrides=["logging.wandb.enabled=false"]))


def test_wandb_without_a_key_writes_one_offline_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody listens where it would send to, and nobody has to; a second stage is the same run."""
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_SILENT", "true")
    identity = "0123456789abcdef" * 4
    began = time.monotonic()
    for stage in ("stage0", "stage2"):
        sink = WeightsAndBiases(
            "bitray", "a-run", identity, str(tmp_path), {"training": {"seed": 7}},
            group="a-sweep", tags=["stage0", "stage2"],
        )  # fmt: skip
        sink.write(stage, 1, {"train/loss": 2.5, "schedule/strength": 0.5})
        sink.close()
    assert time.monotonic() - began < 60
    # W&B's own process goes on to write for a moment.
    _until(lambda: str(histories(tmp_path)), "stage2/step")
    first, second = histories(tmp_path)
    assert first["stage0/train/loss"] == 2.5 and first["stage0/step"] == 1
    assert second["stage2/train/loss"] == 2.5 and second["stage2/schedule/strength"] == 0.5
    for run in run_records(tmp_path):
        assert (run.run_id, run.display_name, run.run_group) == (identity, "a-run", "a-sweep")
        assert list(run.tags) == ["stage0", "stage2"]
        assert {item.key: item.value_json for item in run.config.update}["training"] == '{"seed":7}'


def test_wandb_is_told_of_steps_that_a_checkpoint_holds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 1 to 3, a checkpoint after the second; the worker dies, another goes on from there and
    takes step 3 again. No step is there twice."""
    monkeypatch.setattr("bitray.training.metrics.CLOSING_SECONDS", 300.0)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    first = WeightsAndBiases("bitray", "a-run", "an-id", str(tmp_path), {})
    for step in (1, 2):
        first.write("stage0", step, {"train/loss": float(step)})
    saved = first.saving()
    first.write("stage0", 3, {"train/loss": 3.0})
    saved()
    first.records.put(None)  # what its process would have sent, and no more
    first.thread.join()
    second = WeightsAndBiases("bitray", "a-run", "an-id", str(tmp_path), {})
    second.write("stage0", 3, {"train/loss": 3.0})
    second.close()
    _until(lambda: str([line["stage0/step"] for line in histories(tmp_path)]), "[1, 2, 3]")


def test_what_wandb_wrote_offline_goes_to_the_runs_storage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, s3: str
) -> None:
    monkeypatch.setattr("bitray.training.metrics.CLOSING_SECONDS", 300.0)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    sink = WeightsAndBiases("bitray", "a-run", "an-id", f"{s3}/run", {})
    sink.write("stage0", 1, {"train/loss": 2.5})
    sink.close()
    assert sink.scratch is not None and not Path(sink.scratch.path).exists()
    storage.download_tree(f"{s3}/run/wandb", str(tmp_path / "wandb"))
    assert [line["stage0/train/loss"] for line in histories(tmp_path)] == [2.5]


def test_held_out_losses_go_to_storage_at_once_and_nobody_waits(s3: str, proxy: FlakyS3) -> None:
    """A sweep decides by them; other metrics come with the next checkpoint."""
    uri = f"{s3}/run/metrics.jsonl"
    sink = JsonLines(uri, "stage0", 0)
    sink.write("stage0", 1, {"train/loss": 3.5})
    proxy.rate = 1.0
    began = time.monotonic()
    sink.write("stage0", 1, {"eval/prose_loss": 3.25})
    assert time.monotonic() - began < 30
    proxy.rate = 0.0
    _until(lambda: storage.read_text(uri) if storage.exists(uri) else "", '"eval/prose_loss": 3.25')
    sink.write("stage0", 2, {"train/loss": 3.0})
    sink.close()
    assert storage.read_text(uri).count("\n") == 3


@pytest.fixture
def failing_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What it was asked for, by a W&B that has a key; it answers 503 to all."""
    asked: list[str] = []

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            self.send_error(503)

        def log_message(self, *_: object) -> None: ...

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
        monkeypatch.setenv("WANDB_SILENT", "true")
        wandb.teardown()  # what runs before this one have set up knows another server
        yield asked
        server.shutdown()


TRACKED = """
import os, sys, time
from bitray.training import metrics

metrics.CLOSING_SECONDS = 1.0
sink = metrics.WeightsAndBiases("bitray", "a-run", "id", sys.argv[1], {})
began = time.monotonic()
for step in range(100):
    sink.write("stage0", step, {"train/loss": 1.0})
took = time.monotonic() - began
sys.stdin.readline()
sink.close()
print(took, sink.thread.is_alive(), flush=True)
os._exit(0)
"""


def test_a_tracker_that_is_down_costs_no_step(tmp_path: Path, failing_server: list[str]) -> None:
    """In a process of its own, for W&B goes on asking when that ends in good order."""
    with subprocess.Popen(
        [sys.executable, "-c", TRACKED, str(tmp_path)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    ) as child:  # fmt: skip
        _until(lambda: " ".join(failing_server), "/graphql", 120)
        said, _ = child.communicate("\n", timeout=60)
    took, asks = said.split()
    assert float(took) < 0.5
    assert asks == "True", "nobody waits for it"


@pytest.mark.slow
def test_a_tracker_that_stays_down_is_told(tmp_path: Path, failing_server: list[str]) -> None:
    with pytest.warns(UserWarning, match="Weights & Biases failed, training goes on: .*id"):
        WeightsAndBiases("bitray", "a-run", "id", str(tmp_path), {}).thread.join(300)


@pytest.mark.ray
def test_all_that_was_asked_for_is_written_to(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    words = [f"output_dir={tmp_path}"]
    assert kinds(Config.load(overrides=words)) == [JsonLines, RayMetrics, TensorBoard, Console]
    words += ["logging.tensorboard=false"]
    assert kinds(Config.load(overrides=words)) == [JsonLines, RayMetrics, Console]


@pytest.mark.ray
def test_gauges_stand_at_the_nodes_metrics_endpoint(
    ray_cluster: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Prometheus and the dashboard read them: the last value, by run, stage and source. It stays
    while nothing is told, longer than Ray keeps it by itself, until the stage is closed."""
    import ray

    monkeypatch.setattr(sinks, "AGAIN_S", 0.5)
    sink = RayMetrics("a-run")
    for step, loss in ((1, 3.5), (2, 2.25)):
        sink.write("stage2", step, {
            "train/loss": loss, "mixture/share_code": 0.4, "mixture/weight_code": 0.5,
            "influence/weight_code": 0.6, "influence/weight_old_code": 0.4,
            "influence/score_my_code_old_code": 0.25, "influence/dot_code_code": 8.0,
        })  # fmt: skip
    port = ray.nodes()[0]["MetricsExportPort"]

    def scraped() -> str:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
            return str(answer.read().decode())

    page = _until(scraped, 'run="a-run"')
    lines = {line.split("{")[0]: line for line in page.splitlines() if 'run="a-run"' in line}
    for name, value in (("train_loss", 2.25), ("train_step", 2.0), ("mixture_share", 0.4),
                        ("mixture_weight", 0.5), ("influence_score", 0.25),
                        ("influence_dot", 8.0)):  # fmt: skip
        line = next(v for k, v in lines.items() if k.endswith(f"bitray_{name}"))
        assert float(line.split()[-1]) == value
        assert 'stage="stage2"' in line
    by_source = {name: lines[next(k for k in lines if k.endswith(name))] for name in (
        "mixture_share", "mixture_weight", "influence_score", "influence_dot")}  # fmt: skip
    assert 'source="code"' in by_source["mixture_share"]
    assert 'source="code"' in by_source["mixture_weight"]
    assert 'probe="my_code"' in by_source["influence_score"]
    assert 'source="old_code"' in by_source["influence_score"]
    assert 'probe="code"' in by_source["influence_dot"]
    time.sleep(6)
    assert 'run="a-run"' in scraped(), "as if no step ended any more"
    sink.close()
    _until(lambda: str('run="a-run"' in scraped()), "False")


def _until(ask: Callable[[], str], word: str, seconds: float = 60) -> str:
    """Ray exports every few seconds."""
    end = time.monotonic() + seconds
    while word not in (answer := ask()):
        assert time.monotonic() < end, f"{word} did not come"
        time.sleep(0.5)
    return answer

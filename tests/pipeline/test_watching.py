"""What Prometheus sees of a run: all that panels and rules ask for is really there."""

import json
import re
import shutil
import socket
import subprocess
import time
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from bitray import Config
from bitray.pipeline.run import run

GRAFANA = Path(__file__).parent.parent.parent / "cluster" / "grafana"
METRIC = re.compile(r"\bray_bitray_\w+")
needs = {
    name: pytest.mark.skipif(shutil.which(name) is None, reason=f"{name} is not installed")
    for name in ("promtool", "prometheus")
}


def asked_for() -> set[str]:
    """Metrics of the dashboard and of the rules."""
    texts = (GRAFANA / "bitray.json").read_text() + (GRAFANA / "rules.yml").read_text()
    return set(METRIC.findall(texts))


def test_panels_lie_beside_each_other_and_ask_what_can_be_parsed() -> None:
    dashboard = json.loads((GRAFANA / "bitray.json").read_text())
    places = [(p["gridPos"]["x"], p["gridPos"]["y"]) for p in dashboard["panels"]]
    assert len(set(places)) == len(places) == len({p["id"] for p in dashboard["panels"]})
    assert len(asked_for()) > 15


@needs["promtool"]
def test_rules_fire_when_they_should_and_not_else() -> None:
    for words in (["check", "rules", "rules.yml"], ["test", "rules", "rules_test.yml"],
                  ["check", "config", "--syntax-only", "prometheus.yml"]):  # fmt: skip
        done = subprocess.run(
            ["promtool", *words], cwd=GRAFANA, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stdout + done.stderr


def test_every_rule_has_a_test() -> None:
    groups = yaml.safe_load((GRAFANA / "rules.yml").read_text())["groups"]
    tests = yaml.safe_load((GRAFANA / "rules_test.yml").read_text())["tests"]
    fired = {t["alertname"] for each in tests for t in each["alert_rule_test"] if t["exp_alerts"]}
    assert {rule["alert"] for group in groups for rule in group["rules"]} == fired


@contextmanager
def prometheus(folder: Path, scraped: str) -> Iterator[Callable[[str], list[Any]]]:
    """A real one with our rules, on loopback; gives a function that asks it."""
    config = yaml.safe_load((GRAFANA / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "1s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(GRAFANA / "rules.yml")]
    config["scrape_configs"] = [{"job_name": "ray", "static_configs": [{"targets": [scraped]}]}]
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/db"
    words = ["prometheus", *places, f"--web.listen-address=127.0.0.1:{port}"]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(words, stdout=log, stderr=log)

    def ask(query: str) -> list[Any]:
        url = f"http://127.0.0.1:{port}/api/v1/query?" + urllib.parse.urlencode({"query": query})
        with urllib.request.urlopen(url, timeout=10) as answer:
            return list(json.loads(answer.read())["data"]["result"])

    try:
        wait_for(lambda: _answers(ask), 60)
        yield ask
    finally:
        process.terminate()
        process.wait(30)


def _answers(ask: Callable[[str], list[Any]]) -> bool:
    try:
        return bool(ask("vector(1)"))
    except OSError:
        return False


def wait_for(done: Callable[[], bool], seconds: float) -> None:
    end = time.monotonic() + seconds
    while not done() and time.monotonic() < end:
        time.sleep(0.5)
    assert done()


@pytest.mark.ray
@pytest.mark.slow
@needs["prometheus"]
@pytest.mark.usefixtures("ray_cluster")
def test_a_run_is_seen_by_prometheus(configured: Callable[..., Config], tmp_path: Path) -> None:
    """A metric that a panel asks for and nobody exports would be an empty panel for ever. A peak is
    given, for a CPU has none and no utilisation without; and there are decisions."""
    import ray
    from ray.train.v2._internal.state.state_actor import get_state_actor

    influence = {"enabled": True, "warmup_steps": 2, "update_interval": 2, "budget": 99,
                 "probe_rows": 4, "group_rows": 2}  # fmt: skip
    config = configured(
        "watched", "cost.peak_tflops=0.05", "training.log_every=2", "data.split.probe=0.1",
        *(f"stages.stage2.influence.{name}={value}" for name, value in influence.items()),
    )  # fmt: skip
    target = f"127.0.0.1:{ray.nodes()[0]['MetricsExportPort']}"
    with prometheus(tmp_path, target) as ask:
        run(config)
        found = ask('count by (__name__) (last_over_time({run="watched"}[1h]))')
        seen = {each["metric"]["__name__"] for each in found}
        assert asked_for() <= seen, asked_for() - seen
        shares = ask('last_over_time(ray_bitray_goodput_share{run="watched",stage="stage2"}[1h])')
        last = {each["metric"]["cause"]: float(each["value"][1]) for each in shares}
        assert sum(last.values()) == pytest.approx(1, abs=1e-6) and last["productive"] > 0
        workers = ask("count by (worker) (last_over_time(ray_bitray_worker_own_seconds[1h]))")
        assert {each["metric"]["worker"] for each in workers} == {"0", "1"}
        runs = ray.get(get_state_actor().get_train_runs.remote()).values()
        assert any(each.name.endswith("stage2") for each in runs), "the dashboard's Train tab"
        sources = ask("count by (source) (last_over_time(ray_bitray_mixture_share[1h]))")
        assert {each["metric"]["source"] for each in sources} == set(config.data.sources)
        pairs = ask("count by (probe, source) (last_over_time(ray_bitray_influence_score[1h]))")
        assert len(pairs) == len(config.data.sources) ** 2

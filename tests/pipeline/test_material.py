"""Training beside preparation: it starts before the last unit is there, stops where that fails, and
its rows are those of data that was prepared before.
"""

import json
import random
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from hub_server import Hub
from road import Road

from bitray import Config
from bitray.data import embedded, prepare, train_tokenizer
from bitray.data.job import Job, UnitResult
from bitray.data.manifest import SPLITS, Counts, Manifest, SourceManifest, read_manifest
from bitray.data.plan import MixturePlan, opening
from bitray.data.shards import Shards
from bitray.data.sources import Unit
from bitray.data.units import in_process
from bitray.events import read_events
from bitray.models.loading import build_model, save_model
from bitray.pipeline.groups import RowKind
from bitray.pipeline.material import Material, prepared_beside
from bitray.pipeline.run import prepare_only, run
from bitray.settings import UserError
from bitray.tuning.trial import share

STAGE, STEPS = "stage0", 6
FRESH = "resume.fresh=true"


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """Steps of 1,024 rows: after four of them the first window ends; the sixth is in epoch 2."""
    drawn = random.Random(0)
    for name, count in (("numbers", 5_400), ("few", 200)):
        (tmp_path / name).mkdir()
        texts = [str(drawn.randrange(10**4, 10**6)) for _ in range(count)]
        lines = [json.dumps({"text": text, "unread": "x" * 10}) for text in texts]
        (tmp_path / name / "a.jsonl").write_text("\n".join(lines))
    (tmp_path / "numbers" / "b.jsonl.gz").write_bytes(b"\x1f\x8b and no more")
    shape = {
        "vocab_size": 258, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 2, "max_position_embeddings": 64,
    }  # fmt: skip
    words = [
        f"output_dir={tmp_path}", "experiment=run", f"training={STAGE}_pretrain",
        *(f"model.config.{name}={value}" for name, value in shape.items()),
        "data=local", f"data.sources.numbers.path={tmp_path / 'numbers'}",
        f"data.sources.few.path={tmp_path / 'few'}", "data.sources.few.weight=0.1",
        "data.split.probe=0", "data.max_bad_files=1", "data.unit_bytes=16000", "data.window=4096",
        f"training.max_steps={STEPS}", "training.batch_size=256", "training.max_seq_length=8",
        "training.gradient_accumulation_steps=4", "training.log_every=1",
        "evaluation.rows=8", "export.gguf=[]",
        "logging.tensorboard=false", "report.prompts=[]",
    ]  # fmt: skip
    return Config.load(overrides=words)


Work = Callable[..., Iterator[UnitResult]]


def interrupted(config: Config, then: Work) -> Work:
    """Ray's own work, but beside training the last unit waits until a step is done."""
    on_ray = prepare.on_ray

    def work(
        job: Job, units: Sequence[Unit], reserved: float = 0.0, labels: Mapping[str, str] = {}
    ) -> Iterator[UnitResult]:
        assert not labels
        if not reserved:
            yield from on_ray(job, units)
            return
        assert len(units) > 1
        yield from on_ray(job, units[:-1], reserved)
        patience = time.monotonic() + 240
        while not steps(config):
            assert time.monotonic() < patience, "no step is done before all is prepared"
            time.sleep(0.05)
        yield from then(job, units[-1:], reserved)

    return work


def steps(config: Config) -> list[dict[str, Any]]:
    """What was logged of every step."""
    road = Road(config)
    if not (road.folder / "metrics.jsonl").exists():
        return []
    return [line for line in road.lines(STAGE) if "train/loss" in line]


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_teacher_with_another_tokenizer_than_the_one_trained_here_is_refused(
    config: Config, tmp_path: Path
) -> None:
    """Before anything is prepared."""
    texts = list(embedded.documents("code", max_bytes=60_000))
    save_model(build_model(config.model.config), str(tmp_path / "t"), train_tokenizer(texts, 300))
    with pytest.raises(
        UserError, match=r"^model\.teacher\.path: .* has another tokenizer than the"
    ):
        run(config.override({"model.teacher.path": str(tmp_path / "t")}))
    assert not list(Path(config.output_dir).glob("prepared/*/manifest.json"))


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_training_begins_before_preparing_ends_and_survives_its_failure(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any) -> Iterator[UnitResult]:
        yield from ()
        raise UserError("source 'numbers': the disk is gone")

    monkeypatch.setattr(prepare, "on_ray", interrupted(config, fails))
    with pytest.raises(UserError, match=r"^source 'numbers': the disk is gone$"):
        run(config)
    road, before = Road(config), len(steps(config))
    assert 1 <= before <= 4, "no more steps than the first window has rows for"
    checkpoints = [path.parent.name for path in road.checkpoints(STAGE).glob("*/COMPLETE")]
    assert f"step_{before:06d}" in checkpoints, "no step is lost"
    (root,) = {str(path.parent) for path in road.folder.parent.glob("prepared/*/manifest.json")}
    partial = read_manifest(root)
    assert partial is not None and not partial.done

    monkeypatch.undo()
    run(config)
    logged = steps(config)
    assert [line["step"] for line in logged] == list(range(1, STEPS + 1))
    manifest = read_manifest(root)
    assert manifest is not None and manifest.done
    assert manifest.sources["numbers"].opening == partial.sources["numbers"].opening
    sizes = manifest.sizes()
    plan = MixturePlan(0, sizes, [opening(sizes, {"numbers": 1.0, "few": 0.1})])
    shards = Shards(root, manifest)
    total = 0
    for step, line in enumerate(logged):
        rows = plan.rows(step * 1024, 1024)
        found = {}
        for number, name in enumerate(plan.sources):
            read = shards.read(name, "train", rows.row[rows.source == number])[1]
            found[name] = sum(map(sum, read))
        total += sum(found.values())
        assert line["train/tokens"] == total
        share = found["few"] / sum(found.values())
        assert line["mixture/share_few"] == pytest.approx(share, abs=1e-12)
    epochs = plan.cursors(STEPS * 1024)[0] / sizes["numbers"].rows
    assert road.metrics(STAGE, "mixture/epoch_numbers")[-1] == pytest.approx(epochs)
    assert epochs > 1
    skipped = [event for event in read_events(str(road.folder)) if event["kind"] == "skipped"]
    assert [Path(event["path"]).name for event in skipped] == ["b.jsonl.gz"]
    assert "damaged" in skipped[0]["reason"]


class Units(Material):
    """Ten units, the third of which is bad if it is said to be; what is known is never all."""

    def __init__(self, bad: bool = False) -> None:
        self.bad, self.closed, self.done = bad, False, 0

    @property
    def known(self) -> dict[RowKind, Manifest]:
        source = SourceManifest(splits=dict.fromkeys(SPLITS, Counts()), done=self.done == 10)
        values = {"length": 8, "group_rows": 1, "window": 4, "tokenizer": "t", "vocab_size": 9}
        rest = {"eos_token_id": 0, "made_from": {}, "sources": {"a": source}}
        return {RowKind(8, True): Manifest(job="m", **values, **rest)}

    def rest(self, reserved: float = 0.0) -> Generator[bool]:
        try:
            for self.done in range(1, 11):
                if self.bad and self.done == 3:
                    raise UserError("a.txt is gone")
                yield self.done % 2 == 0
        finally:
            self.closed = True


@pytest.mark.parametrize(
    ("bad", "asked_at", "told", "stops"),
    [(False, 99, 5, 0), (True, 99, 1, 1), (False, 4, 2, 1)],
    ids=["whole", "bad", "asked to stop"],
)
def test_what_is_known_is_told_and_an_early_end_is_said(
    bad: bool, asked_at: int, told: int, stops: int
) -> None:
    units, tells, stopped = Units(bad), [], []
    over = threading.Event()

    def tell(known: object) -> None:
        tells.append(known)

    def asked() -> bool:
        if units.done in {10, asked_at}:
            over.set()
        return units.done == asked_at

    with prepared_beside(units, 0.0, tell, lambda: stopped.append(1), asked) as errors:
        if not bad:
            assert over.wait(60)
        patience = time.monotonic() + 60
        while not units.closed or len(stopped) < stops:
            assert time.monotonic() < patience
            time.sleep(0.01)
    assert [len(tells), len(stopped)] == [told, stops]
    assert [str(error) for error in errors] == ["a.txt is gone"] * bad


def test_when_training_ends_so_does_preparing(monkeypatch: pytest.MonkeyPatch) -> None:
    units, stopped, go = Units(), [], threading.Event()

    def tell(_: object) -> None:
        go.wait(60)

    monkeypatch.setattr(threading.Thread, "join", _setting(go, threading.Thread.join))
    with prepared_beside(units, 0.0, tell, lambda: stopped.append(1), lambda: False):
        pass
    assert units.closed and units.done == 2 and not stopped


def _setting(event: threading.Event, join: Callable[..., None]) -> Callable[..., None]:
    """A `join` that sets an event first: by then the thread knows that it is over."""

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        event.set()
        join(thread, timeout)

    return joined


@pytest.fixture
def on_hub(hub: Hub, tmp_path: Path) -> Callable[..., Config]:
    """A run on a dataset of the Hub, whose rows a model's own tokenizer makes."""
    (tmp_path / "corpus").mkdir()
    lines = "".join(json.dumps({"text": f"number {k} of many"}) + "\n" for k in range(200))
    (tmp_path / "corpus" / "a.jsonl").write_text(lines)
    hub.push("org/corpus", tmp_path / "corpus")

    def of(experiment: str, revision: str = "", *more: str) -> Config:
        return Config.load(overrides=[
            f"output_dir={tmp_path}", f"experiment={experiment}", "data=local",
            f"data.sources.texts.path=hf://datasets/org/corpus{revision}",
            "model.config.vocab_size=265", *more,
        ])  # fmt: skip

    return of


def test_a_run_goes_on_with_the_commit_it_began_with(
    on_hub: Callable[..., Config], hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files, tokenizer and names of rows are those of the start: whatever is pushed, and where the
    Hub is gone. Another run, another revision and a fresh start are of what is there by then."""
    # in this process, for workers of a Ray that runs know another Hub
    monkeypatch.setattr(prepare, "on_ray", lambda job, units, **_: in_process(job, units))
    monkeypatch.setattr("bitray.pipeline.run.ray_session", nullcontext)

    def commit(config: Config) -> str:
        [job, *_] = Material(config).jobs.values()
        return job.inputs["texts"][0].uri.split("@")[1].split("/")[0]

    table = prepare_only(on_hub("run")).text()
    begun = Material(on_hub("run"))
    hub.push("org/corpus", tmp_path / "corpus")
    first, later = hub.commits["org/corpus"]
    again = Material(on_hub("run"))
    assert (again.folders, again.tokenizer) == (begun.folders, begun.tokenizer)
    assert commit(on_hub("run")) == commit(on_hub("other", f"@{first}")) == first
    assert commit(on_hub("other")) == commit(on_hub("run", "", FRESH)) == later
    assert commit(on_hub("run", f"@{later}")) == later
    hub.close()
    assert prepare_only(on_hub("run")).text() == table
    with pytest.raises(UserError, match="cannot be reached"):
        commit(on_hub("other"))
    share(on_hub("trial"), begun.config.run_dir)
    assert commit(on_hub("trial")) == first, "trials have what they share from the same commit"

"""The auditor: a run in good order is green, and every violation that is planted is found."""

import hashlib
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from audit_run import audit, main

from bitray import checkpoint, lease, storage
from bitray.data.manifest import Counts, Manifest, Shard, SourceManifest, write_manifest
from bitray.data.mixture import Mixture, StageMixture
from bitray.data.packing import Row
from bitray.data.plan import SourceSize
from bitray.data.shards import ShardWriter, group_rows
from bitray.events import Events

LENGTH, ROWS, SIZE, STEPS = 8, 40, 4, 6
"""Tokens of a row, rows of the source, rows of a step, steps of the stage."""


def tokens_of(row: int) -> int:
    return 1 + row % LENGTH


@dataclass
class Run:
    """A run of one stage, with a stop and a continuation, written by the code that writes runs."""

    folder: Path
    prepared: str

    def __post_init__(self) -> None:
        size = SourceSize(ROWS, sum(map(tokens_of, range(ROWS))))
        stage = StageMixture(
            seed=0, manifest="m", sizes={"a": size}, weights={"a": 1.0}, length=LENGTH,
            steps=STEPS, rows_per_ticket=2, tickets_per_step=2, bundle=1, lead=2, period=3,
            bounds=(0.1, 1.0),
        )  # fmt: skip
        self.tokens = [0]
        for epoch, (first, last) in enumerate([(0, 4), (4, STEPS)], 1):
            with lease.held(str(self.folder)) as held:
                self.mixture = (
                    Mixture.opened(stage, 1, None, epoch=1)
                    if epoch == 1
                    else Mixture.opened(stage, 2, self.state, epoch=2)
                )
                driver, worker = Events(held, "driver"), Events(held, "stage2")
                driver.write("lease", host="h", pid=1)
                driver.write("start", lineage=1)
                directory = self.step(first) if first else None
                worker.write(
                    "resume", stage="stage2", step=first, directory=directory, data_step=first,
                    log_every=1, prepared=self.prepared,
                )  # fmt: skip
                for step in range(first + 1, last + 1):
                    self.train(step, epoch, worker)
                driver.write("stop" if last < STEPS else "end")
        storage.write_json(str(self.folder / "mixture/stage2.json"), self.mixture.to_json())

    @property
    def root(self) -> Path:
        return self.folder / "stage2_checkpoint" / "checkpoints"

    def step(self, number: int) -> str:
        return checkpoint.step_directory(str(self.root), number)

    def train(self, step: int, epoch: int, worker: Events) -> None:
        rows = self.mixture.plan.rows((step - 1) * SIZE, SIZE).row
        self.tokens.append(self.tokens[-1] + sum(tokens_of(int(row)) for row in rows))
        line = {"stage": "stage2", "step": step, "train/tokens": self.tokens[step]}
        with (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        if step % 3 == 0:
            self.mixture.decide(step, {"a": 1.0})
        if step % 2:
            return
        self.state = self.mixture.state(step)
        position = {"step": step, "tokens": self.tokens[step]}
        state = {"position": position, "data": self.state, "epoch": epoch, "stage": "stage2"}
        checkpoint.save(self.step(step), {"model": {"w": torch.ones(3)}}, state)
        worker.write("checkpoint", stage="stage2", step=step, directory=self.step(step))

    def event(self, kind: str, number: int, /, **changes: Any) -> None:
        """Alter the `number`-th event of a kind."""
        found = 0
        for path in sorted((self.folder / "events").iterdir(), key=lambda p: p.name):
            lines = [json.loads(line) for line in path.read_text().splitlines()]
            for line in lines:
                if line["kind"] == kind:
                    line.update(changes if found == number else {})
                    found += 1
            path.write_text("".join(json.dumps(line) + "\n" for line in lines))
        assert found > number

    def json(self, path: Path, change: Callable[[Any], Any]) -> None:
        values = json.loads(path.read_text())
        change(values)
        path.write_text(json.dumps(values))

    def metrics(self, change: Callable[[list[str]], Any]) -> None:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        change(lines)
        (self.folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))

    def save_again(self, step: int, change: Callable[[dict[str, Any]], Any]) -> None:
        """A checkpoint that is whole, and says something else."""
        state = checkpoint.load_state(self.step(step))
        change(state)
        checkpoint.save(self.step(step), {"model": {"w": torch.ones(3)}}, state)


@pytest.fixture
def run(tmp_path: Path) -> Run:
    writer, prepared = ShardWriter(LENGTH), tmp_path / "prepared"
    for row in range(ROWS):
        count = tokens_of(row)
        ids = torch.zeros(LENGTH, dtype=torch.int32).numpy()
        writer.add([Row(ids, [count], [0])])
    content = writer.close().to_pybytes()
    storage.write_bytes(str(prepared / "a.arrow"), content)
    shard = Shard(
        name="a.arrow", rows=ROWS, size=len(content), sha256=hashlib.sha256(content).hexdigest()
    )  # fmt: skip
    total = sum(map(tokens_of, range(ROWS)))
    counts = Counts(documents=ROWS, tokens=total, rows=ROWS, shards=(shard,))
    splits = {"train": counts, "probe": Counts(), "validation": Counts()}
    manifest = Manifest(
        job="m", length=LENGTH, group_rows=group_rows(LENGTH), window=4096, tokenizer="t",
        vocab_size=9, eos_token_id=0, made_from={},
        sources={"a": SourceManifest(splits=splits, done=True)},
    )  # fmt: skip
    write_manifest(str(prepared), manifest)
    return Run(tmp_path / "run", str(prepared))


def test_a_run_in_good_order_is_green(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    assert audit(str(run.folder)) == []
    monkeypatch.setattr(sys, "argv", ["audit_run.py", str(run.folder)])
    with pytest.raises(SystemExit) as left:
        main()
    assert left.value.code == 0


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def spoil(path: Path, line: str) -> None:
    """Put something into the second line of a file, or behind a first one."""
    first, *rest = path.read_text().splitlines()
    path.write_text("".join(f"{each}\n" for each in (first, line, *rest)))


def entry(**changes: Any) -> Callable[[Run], None]:
    """The journal's decision, altered."""
    return lambda run: run.json(
        run.folder / "mixture/stage2.json", lambda values: values["journal"][1].update(changes)
    )


PLANTED: dict[str, tuple[Callable[[Run], Any], str]] = {
    "a step twice": (lambda r: r.metrics(lambda m: m.insert(3, m[1])), "was trained twice"),
    "a step left out": (lambda r: r.metrics(lambda m: m.pop(2)), "has no step between 2 and 4"),
    "fewer tokens": (
        lambda r: r.metrics(lambda m: m.append(m.pop(2).replace('"step": 3', '"step": 7'))),
        "fewer tokens at step 7",
    ),
    "an old checkpoint taken": (
        lambda r: r.event("resume", 1, step=2, data_step=2, directory=r.step(2)),
        "though a checkpoint of step 4 was saved before",
    ),
    "another step than the checkpoint's": (
        lambda r: r.event("resume", 1, step=3), "started at step 3 from"
    ),
    "a flipped bit": (lambda r: flip(Path(r.step(4), "__0_0.distcp")), "does not have the sha256"),
    "a removal for nothing": (
        lambda r: Events(lease.Claim(str(r.folder), 2, "x"), "w").write(
            "removed", stage="stage2", directories=["x"], newest=r.step(9)
        ),
        "which was never saved",
    ),
    "an epoch that fell": (
        lambda r: r.save_again(6, lambda s: s.update(epoch=0)), "under epoch 0, after one of epoch"
    ),
    "an epoch that was never leased": (lambda r: r.event("lease", 1, epoch=7), "never leased"),
    "a late writer": (
        lambda r: r.event("checkpoint", 0, time=9e12), "written after epoch 2 had begun"
    ),
    "two drivers": (lambda r: r.event("lease", 1, epoch=1), "has two drivers"),
    "a decision about issued tickets": (entry(first_row=16), "tickets may have been issued"),
    "a decision out of order": (entry(step=-2), "step -2 comes after -1"),
    "weights beyond their bounds": (
        lambda r: r.json(
            r.folder / "mixture/stage2.json", lambda v: v["stage"].update(bounds=[0.0, 0.5])
        ),
        "are not within 0.0 and 0.5",
    ),
    "weights that sum to less": (entry(weights=[5]), "the weights sum to 5"),
    "a journal epoch that was never leased": (entry(epoch=9), "epoch 9 was never leased"),
    "a checkpoint of another journal": (
        lambda r: r.save_again(6, lambda s: s["data"]["journal"][1].update(first_row=99)),
        "its journal is no beginning",
    ),
    "a place that is not the step's": (
        lambda r: r.save_again(6, lambda s: s["data"].update(next_row=23)), "goes on at row 23"
    ),
    "tokens that were not trained": (
        lambda r: (
            r.save_again(6, lambda s: s["position"].update(tokens=7)),
            r.metrics(lambda m: m.pop()),
        ),
        "counts 7 tokens, and its rows have",
    ),
    "a failure without a cause": (
        lambda r: r.event("stop", 0, kind="failed", reason=""), "epoch 1 failed, and does not say"
    ),
    "an end without a word": (
        lambda r: r.event("end", 0, kind="note"), "epoch 2 is over, and does not say how it ended"
    ),
    "an event that is broken": (
        lambda r: spoil(next(r.folder.glob("events/*-driver-*")), "{"), "line 2: not JSON"
    ),
    "an event that is none": (
        lambda r: spoil(next(r.folder.glob("events/*-stage2-*")), "[]"), "line 2: is no event"
    ),
    "an event that lacks what it tells": (
        lambda r: r.event("resume", 0, log_every=None), "holds what no run writes"
    ),
    "metrics that are broken": (
        lambda r: spoil(r.folder / "metrics.jsonl", "nonsense"), "metrics.jsonl, line 2: not JSON"
    ),
    "a mixture that is broken": (
        lambda r: spoil(r.folder / "mixture/stage2.json", "?"), "stage2.json, line 2: not JSON"
    ),
    "a secret": (
        lambda r: (r.folder / "config.yaml").write_text("key: hunter2hunter2"),
        "holds the value of WANDB_API_KEY",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PLANTED)
def test_a_planted_violation_is_found(
    run: Run, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "hunter2hunter2")
    assert audit(str(run.folder)) == []
    plant, said = PLANTED[name]
    plant(run)
    monkeypatch.setattr(sys, "argv", ["audit_run.py", str(run.folder)])
    with pytest.raises(SystemExit) as left:
        main()
    told = capsys.readouterr().out
    assert left.value.code == 1 and said in told, told
    assert "hunter2" not in told


def test_a_driver_that_was_killed_could_not_say_how_it_ended(
    run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    run.event("stop", 0, kind="note")
    (run.folder / "lease/000001.released").unlink()
    assert audit(str(run.folder)) == []
    assert "note: the driver of epoch 1 goes on, or was killed" in capsys.readouterr().out


def test_a_folder_that_holds_no_run_is_not_green(
    run: Run, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder, hint in (
        (run.folder.parent, f"; there are {run.folder}\n"),
        (run.folder / "x", "\n"),
    ):
        monkeypatch.setattr(sys, "argv", ["audit_run.py", str(folder)])
        with pytest.raises(SystemExit) as left:
            main()
        said = capsys.readouterr().err
        assert left.value.code == 2
        assert said == f"error: {folder}: there is no run, for it has no events/{hint}"

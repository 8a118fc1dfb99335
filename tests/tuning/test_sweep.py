"""What a trial tells Tune of a run's records, by hand."""

import errno
import json
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import ray
import yaml

from bitray import Config, checkpoint, lease, storage
from bitray.pipeline.folders import StageFolder, original, predecessor
from bitray.pipeline.report import read_metrics
from bitray.retries import StorageGone
from bitray.settings import Passing, UserError
from bitray.tuning import AxSearcher, SearchSpace
from bitray.tuning import sweep as sweep_module
from bitray.tuning import trial as trial_module
from bitray.tuning.checks import METRICS
from bitray.tuning.cost import cost_table
from bitray.tuning.stages import lengths
from bitray.tuning.sweep import Cleaner, claim, concurrent, longest, room, scheduler_of, sweep
from bitray.tuning.trial import (
    clean,
    evaluated,
    history,
    outcome,
    share,
    trial_config,
    trial_name,
)

WORDS = [
    "stages.stage1_9.max_steps=10", "stages.stage1_9.lambda_warmup.warmup_steps=5",
    "stages.stage2.max_steps=20",
]  # fmt: skip
LINES = [
    {"stage": "stage1_9", "step": 10, "eval/a_loss": 4.0, "train/peak_memory_gb": 3.0,
     "train/seconds": 100.0},
    {"stage": "stage2", "step": 4, "train/tokens_per_second": 100.0},
    {"stage": "stage2", "step": 10, "eval/a_loss": 2.0, "eval/b_loss": 3.0,
     "train/peak_memory_gb": 2.0, "train/seconds": 160.0},
]  # fmt: skip


def config_at(folder: Path) -> Config:
    return Config.load(overrides=[*WORDS, f"output_dir={folder}", "experiment=t"])


def complete(run: Path, stage: str) -> None:
    """A stage's final checkpoint without tensors."""
    storage.write_text(f"{StageFolder(str(run), stage).final}/{checkpoint.COMPLETE}", "{}")


def test_metrics_of_a_trial_on_its_way(tmp_path: Path) -> None:
    config = config_at(tmp_path)
    storage.write_json(f"{config.run_dir}/evaluations.json", {"stage1": {"a": 6.0, "b": 5.0}})
    row = 256 * 8  # length and global batch of the demo's stages
    assert lengths(config) == {"stage1_9": 10 * row, "stage2": 20 * row}
    told = outcome(config, LINES)
    tokens = 10 * row + 10 * row
    assert told["loss"] == 2.5 and told["loss_drop"] == 3.0
    assert (told["tokens"], told["steps"]) == (tokens, 20)
    assert told["seconds"] == 160 and told["peak_memory_gb"] == 3.0
    assert told["tokens_per_second"] == tokens / 160
    assert told["tokens_per_second_per_gb"] == pytest.approx(tokens / 160 / 3)
    assert told["loss_drop_per_second_per_gb"] == pytest.approx(3 / 160 / 3)
    assert told["progress"] == pytest.approx(2 / 3)
    assert outcome(config, LINES[:1] + LINES[:1])["progress"] == pytest.approx(1 / 3)
    assert set(told) == {*METRICS, "progress"}


def test_a_trial_waits_for_a_writer_that_was_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it cannot have now is no fault of its settings; what is wrong with them is."""
    config, tries, errors = config_at(tmp_path), [], []

    def run(config: Config) -> None:
        tries.append(lease.acquire(config.run_dir))

    monkeypatch.setattr(trial_module, "run", run)
    monkeypatch.setattr(lease, "BEAT_S", 0.05)
    writer = lease.acquire(config.run_dir)
    threading.Timer(0.5, writer.release).start()
    trial_module._run(config, errors)
    assert [claim.epoch for claim in tries] == [writer.epoch + 1] and not errors
    monkeypatch.setattr(trial_module, "PATIENCE_S", 0.0)
    trial_module._run(config, errors)
    [error] = errors
    assert isinstance(error, lease.Held)


@pytest.mark.parametrize(
    ("error", "hopeless"),
    [
        (UserError("lr: too high"), True),
        (RuntimeError("CUDA error: out of memory"), True),
        (RuntimeError("connection reset"), False),
        (lease.Held("another driver"), False),
        (StorageGone("s3://b: does not answer"), False),
        (Passing("the workers failed more than 3 times"), False),
    ],
)
def test_what_is_no_fault_of_the_settings_is_tried_again(error: Exception, hopeless: bool) -> None:
    wrapped = RuntimeError("of Ray")
    wrapped.__cause__ = error
    for each in (error, wrapped):
        assert trial_module._hopeless(each) is (error if hopeless else None)


STEPS, WARMUP = "stages.stage2.max_steps", "stages.stage2.lambda_warmup.warmup_steps"
ILLEGAL = {STEPS: 5, WARMUP: 15}
"""Each is legal for itself."""


def test_a_point_that_the_run_refuses_ends_nothing_but_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config, base, told = config_at(tmp_path), str(tmp_path / "sweep" / "common"), []
    monkeypatch.setattr(trial_module.tune, "report", told.append)
    trial_module.trial(ILLEGAL, config, base)
    [last] = told
    assert "15 is longer than the stage (5 steps)" in last["abandoned"]
    space = space_of(
        parameters={STEPS: {"int": [5, 20]}, WARMUP: {"int": [1, 15]}}, start=[ILLEGAL]
    )
    searcher = AxSearcher(space, ahead=0)
    while (sample := searcher.suggest("t")) is None:
        searcher.settle()
    searcher.on_trial_complete("t", {**last, "config": sample})
    [found] = searcher.ended()
    assert found.status == "abandoned" and found.overrides == ILLEGAL
    assert scheduler_of(searcher, config, base)
    assert history(config, base, ILLEGAL) == []
    spans = {trial_name(ILLEGAL): [[0.0, 3600.0]]}
    rows = {row[0]: row[1:] for row in cost_table(config, [found], spans).rows}
    assert rows["abandoned"] == ["1", "1", "0"], "it never had a worker"
    clean(base, ILLEGAL)


def test_a_folder_that_still_grows_is_removed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers of a trial that was stopped early write on while their checkpoints are deleted."""
    base, cleaner = (
        tmp_path / "sweep" / "common",
        Cleaner(str(tmp_path / "sweep" / "common"), False),
    )
    folders = []
    for rate in (1e-3, 2e-3):
        sample = {"stages.stage2.optimizer.lr": rate}
        run = Path(trial_config(config_at(tmp_path), str(base), sample).run_dir)
        complete(run, "stage2")
        folders.append(run / "stage2_checkpoint")
        with monkeypatch.context() as patch:
            if rate == 1e-3:
                patch.setattr("os.rmdir", Mock(side_effect=OSError(errno.ENOTEMPTY, "not empty")))
            cleaner.on_trial_complete(0, [], SimpleNamespace(config=sample))
            assert folders[0].exists() == (rate == 1e-3)
    assert not any(folder.exists() for folder in folders)


def test_checkpoints_of_a_trial_go_and_nothing_else(tmp_path: Path) -> None:
    base, sample = tmp_path / "sweep" / "common", {"stages.stage2.optimizer.lr": 1e-3}
    run = Path(trial_config(config_at(tmp_path), str(base), sample).run_dir)
    for folder, stage in ((run, "stage1_9"), (run, "stage2"), (base, "stage1")):
        complete(folder, stage)
    storage.write_text(str(run / "metrics.jsonl"), "")
    clean(str(base), sample)
    assert [path.name for path in run.iterdir()] == ["metrics.jsonl"]
    assert StageFolder(str(base), "stage1").complete


def test_half_a_line_is_not_read(tmp_path: Path) -> None:
    text = "".join(json.dumps(line) + "\n" for line in LINES)
    storage.write_text(f"{tmp_path}/metrics.jsonl", text + '{"stage": "sta')
    assert read_metrics(str(tmp_path)) == LINES and read_metrics(str(tmp_path / "nothing")) == []


def test_stages_that_none_varies_are_those_of_the_common_run(tmp_path: Path) -> None:
    base = tmp_path / "sweep" / "common"
    for stage in ("stage0", "stage1"):
        complete(base, stage)
    storage.write_json(str(base / "evaluations.json"), {"stage1": {"a": 6.0}, "stage2": {"a": 1.0}})
    storage.write_json(str(base / "mixture" / "stage0.json"), {"rows": 5})
    sample = {"stages.stage2.optimizer.lr": 1e-3}
    config = trial_config(config_at(tmp_path), str(base), sample)
    assert config.stages["stage2"].optimizer.lr == 1e-3
    assert trial_config(config_at(tmp_path), str(base), sample).run_dir == config.run_dir
    wandb = config.logging.wandb
    assert wandb.group == "sweep" and wandb.tags == ("stage1_9", "stage2")
    for _ in range(2):
        share(config, str(base))
    run = Path(config.run_dir)
    assert run.parent == tmp_path / "sweep" / "trials"
    first = StageFolder(str(base), "stage1").final
    assert predecessor(config, "stage1_9") == first and not StageFolder(str(run), "stage1").complete
    assert original(config) == StageFolder(str(base), "stage0").final
    complete(run, "stage1_9")
    assert predecessor(config, "stage2") == StageFolder(str(run), "stage1_9").final
    assert json.loads((run / "evaluations.json").read_text()) == {"stage1": {"a": 6.0}}
    assert json.loads((run / "mixture" / "stage0.json").read_text()) == {"rows": 5}


# ------------------------------------------------------------------------------- sweeps as a whole


def space_of(**said: object) -> SearchSpace:
    told = {
        "parameters": {"stages.stage2.optimizer.lr": {"loguniform": [1e-3, 8e-3]}},
        "objectives": {"loss": "minimize"},
        "num_trials": 4,
        "sobol_trials": 4,
        **said,
    }
    return SearchSpace.load_text(yaml.safe_dump(told), "here")


def test_a_folder_holds_one_sweep(tmp_path: Path) -> None:
    config = config_at(tmp_path)
    for more in ({}, {"num_trials": 9}, {"scheduler": {"type": "none"}}):
        claim(space_of(**more), config, str(tmp_path))
    with pytest.raises(UserError, match=r"another sweep: space\.objectives\.loss is 'minimize'"):
        claim(space_of(objectives={"loss": "maximize"}), config, str(tmp_path))
    with pytest.raises(UserError, match=r"stage2\.optimizer\.weight_decay is 0.0.* and 0.5 here"):
        claim(
            space_of(),
            config.override({"stages.stage2.optimizer.weight_decay": 0.5}),
            str(tmp_path),
        )


def test_early_stopping_remembers_the_trials_of_a_driver_that_is_gone(tmp_path: Path) -> None:
    """Three trials have ended; a fourth that is worse than two thirds of them does not go on."""
    config, base = config_at(tmp_path), str(tmp_path / "sweep" / "common")
    searcher = AxSearcher(space_of(), ahead=0)
    total, row = sum(lengths(config).values()), 256 * 8
    for n in range(3):
        while (sample := searcher.suggest(f"t{n}")) is None:
            searcher.settle()
        run = trial_config(config, base, sample).run_dir
        storage.write_json(f"{run}/evaluations.json", {"stage1": {"a": 6.0}})
        lines = [LINES[0] | {"eval/a_loss": 4.0 + n}]
        storage.write_text(f"{run}/metrics.jsonl", "".join(json.dumps(x) + "\n" for x in lines))
        [told] = evaluated(trial_config(config, base, sample))
        searcher.on_trial_complete(f"t{n}", {**told, "config": sample})
    before = {"tokens": 10 * row, "loss": 5.5}
    assert before["tokens"] >= 0.25 * total
    for losses, action in ((5.5, "STOP"), (4.5, "CONTINUE"), (3.0, "CONTINUE")):
        scheduler, trial = scheduler_of(searcher, config, base), SimpleNamespace(trial_id="new")
        scheduler.on_trial_add(None, trial)
        expected = "CONTINUE" if losses <= 4 + 2 / 3 else "STOP"  # a third of three, interpolated
        told = scheduler.on_trial_result(None, trial, {**before, "loss": losses})
        assert told == action == expected


@pytest.mark.parametrize(
    ("parameters", "steps", "rows"),
    [
        ({"gradient_accumulation_steps": {"int": [1, 8]}}, 20, 4 * 8),
        ({"max_steps": {"ordered": [5, 10, 20]}, "batch_size": {"choice": [2, 8]}}, 20, 8 * 2),
        ({"max_steps": {"fixed": 5}}, 5, 8),
        ({"optimizer.lr": {"uniform": [1e-3, 1e-2]}}, 20, 8),
    ],
)
def test_the_longest_trial_of_a_space(
    tmp_path: Path, parameters: dict, steps: int, rows: int
) -> None:
    """Nobody is stopped for being longer than a trial with the settings of the run."""
    config = config_at(tmp_path)
    named = {f"stages.stage2.{path}": each for path, each in parameters.items()}
    space = space_of(parameters={WARMUP: {"int": [1, 5]}, **named})
    expected = 256 * (10 * 8 + steps * rows)
    assert longest(space, config) == expected
    asha = scheduler_of(AxSearcher(space, ahead=0), config, str(tmp_path / "sweep" / "common"))
    assert asha._max_t == expected


def test_a_sweep_has_one_driver(tmp_path: Path) -> None:
    space = space_of(run={"output_dir": str(tmp_path), "experiment": "mine"})
    with lease.held(str(tmp_path / "mine")), pytest.raises(lease.Held, match="being written by"):
        sweep(space, "mine")
    assert not (tmp_path / "mine" / "sweep.json").exists()


@pytest.mark.parametrize(
    ("nodes", "words", "expected"),
    [
        ([{"CPU": 1}] * 3, ["scaling.cpus_per_worker=0.5"], 3),
        ([{"CPU": 3}], ["scaling.cpus_per_worker=0.5"], 3),
        ([{"CPU": 1}] * 3, ["scaling.cpus_per_worker=0.8", "scaling.readers=1"], 2),
        ([{"CPU": 64, "GPU": 2}], ["scaling.use_gpu=true"], 2),
        ([{"CPU": 64, "GPU": 2}], ["scaling.use_gpu=true", "scaling.gpus_per_worker=0.3"], 6),
        ([{"CPU": 64, "GPU": 1}] * 2, ["scaling.use_gpu=true", "scaling.num_workers=2"], 1),
    ],
)
def test_as_many_trials_as_nodes_hold(
    monkeypatch: pytest.MonkeyPatch, nodes: list[dict], words: list[str], expected: int
) -> None:
    """A worker is on one node; shares of a GPU are of the same GPU."""
    monkeypatch.setattr(
        ray,
        "nodes",
        lambda: [{"Alive": True, "Resources": {k: float(v) for k, v in n.items()}} for n in nodes],
    )
    words = ["scaling.num_workers=1", *words]
    assert room(Config.load(overrides=[*WORDS, *words])) == expected


MAY_COME = "an autoscaler may bring nodes; max_concurrent says for how many trials"


@pytest.mark.parametrize(
    ("brings", "wanted", "found"),
    [
        (False, None, (2, "")),
        (False, 1, (1, "")),
        (False, 4, (2, "note: the cluster holds 2 trials at a time, not 4\n")),
        (True, 4, (4, "")),
        (True, None, (2, f"note: {MAY_COME}, for now 2\n")),
    ],
)
def test_where_an_autoscaler_brings_nodes_the_space_says_how_many_trials(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    brings: bool,
    wanted: int | None,
    found: tuple[int, str],
) -> None:
    given, config = space_of(max_concurrent=wanted), Config.load(overrides=WORDS)
    monkeypatch.setattr(sweep_module, "room", lambda _: 2)
    monkeypatch.setattr(sweep_module, "autoscales", lambda: brings)
    assert (concurrent(given, config), capsys.readouterr().out) == found


def test_no_room_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    given, config = space_of(), Config.load(overrides=WORDS)
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"CPU": 0.5}}])
    monkeypatch.setattr(sweep_module, "autoscales", lambda: False)
    with pytest.raises(UserError, match="does not hold the workers of a single trial"):
        concurrent(given, config)
    monkeypatch.setattr(sweep_module, "autoscales", lambda: True)
    assert concurrent(given, config) == 1

"""Influence in a real run on Ray: decisions are taken, recorded, take effect and survive a kill."""

import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from road import Road, differing, weights
from test_run import wait_for, workers
from wandb_file import histories, run_records

from bitray import Config, checkpoint
from bitray.data.manifest import Counts, Manifest, SourceManifest, read_manifest, write_manifest
from bitray.data.plan import Entry
from bitray.data.shards import Shards
from bitray.pipeline.remix import remixing
from bitray.pipeline.report import influence_matrix, series_of
from bitray.pipeline.run import run
from bitray.settings import UserError

SOURCES = ("code", "prose", "arithmetic")
STEPS, LEAD = 32, 16


@pytest.fixture(scope="module")
def configured_to_remix(words: Callable[..., list[str]]) -> Callable[..., Config]:
    def of(experiment: str, *more: str) -> Config:
        shared = [w for w in words(experiment) if not w.startswith(("stages.", "export."))]
        return Config.load(
            overrides=[
                "training=stage0_pretrain", *shared, f"training.max_steps={STEPS}",
                "data.split.probe=0.1", "training.save_every=5",
                "training.influence.enabled=true", "training.influence.warmup_steps=4",
                "training.influence.update_interval=4", "training.influence.budget=99",
                "training.influence.probe_rows=4", "training.influence.group_rows=2",
                "training.influence.learning_rate=0.8", "training.influence.probes={code: 1}",
                *more,
            ]
        )  # fmt: skip

    return of


@pytest.fixture(scope="module")
def remixed(ray_cluster: None, configured_to_remix: Callable[..., Config]) -> Road:
    config = configured_to_remix("remixed", "logging.wandb.enabled=true")
    return Road(config, run(config))


@pytest.mark.ray
def test_decisions_are_taken_recorded_and_take_effect(remixed: Road) -> None:
    journal = remixed.json("mixture/stage0.json")["journal"]
    assert [entry["step"] for entry in journal] == [-1, *range(4, STEPS + 1, 4)]
    assert [e["first_row"] for e in journal[1:]] == [6 * (e["step"] + LEAD) for e in journal[1:]]
    assert len({tuple(entry["weights"]) for entry in journal}) > 2
    for entry in journal[1:]:
        assert sum(entry["weights"]) == 4096
        assert all(0.05 * 4096 <= w <= 0.6 * 4096 for w in entry["weights"])
        assert set(entry["notes"]["scores"]) == {"code"}
    held = checkpoint.load_state(remixed.final("stage0"))["data"]["journal"]
    assert [Entry.from_json(entry) for entry in held] == [Entry.from_json(e) for e in journal]
    assert not any({"scores", "errors"} & set(entry["notes"]) for entry in held)
    shares = remixed.metrics("stage0", "mixture/share_code")
    assert len(shares) == STEPS
    logged = remixed.metrics("stage0", "influence/weight_code")
    assert logged == [entry["weights"][0] / 4096 for entry in journal[1:]]
    before = [[e for e in journal if e["first_row"] < 6 * step][-1] for step in range(1, STEPS + 1)]
    for number, source in enumerate(SOURCES):
        in_force = remixed.metrics("stage0", f"mixture/weight_{source}")
        assert in_force == [entry["weights"][number] / 4096 for entry in before]


@pytest.mark.ray
def test_the_report_shows_the_mixture_and_the_matrix(remixed: Road) -> None:
    page = (remixed.folder / "report.html").read_text()
    for title in ("decided weights", "realised shares", "Influence matrix", "Loss by source"):
        assert title in page
    records = [line for line in remixed.lines("stage0") if "influence/seconds" in line]
    matrix = influence_matrix(records[-1])
    assert list(matrix) == ["code"] and tuple(matrix["code"]) == SOURCES
    curves, _ = series_of(remixed.lines("stage0"), ("mixture/loss_*",))
    assert set(curves) == set(SOURCES)


@pytest.mark.ray
def test_wandb_gets_what_is_told_by_source(remixed: Road) -> None:
    """Decided weights, realised shares, the influence matrix, losses: all numbers of the file."""
    by_source = ("mixture/share_", "mixture/loss_", "mixture/weight_", "influence/weight_",
                 "influence/score_code_")  # fmt: skip
    told: dict[int, dict[str, float]] = {}
    for record in remixed.lines("stage0"):
        told.setdefault(record["step"], {}).update(
            {f"stage0/{k}": v for k, v in record.items() if k.startswith(by_source)}
        )
    sent: dict[int, dict[str, float]] = {}
    for row in histories(remixed.folder):
        sent.setdefault(row["stage0/step"], {}).update(row)
    for prefix in by_source:
        for source in SOURCES:
            assert sum(f"stage0/{prefix}{source}" in row for row in told.values()) >= 8
    for step, row in told.items():
        assert {name: sent[step][name] for name in row} == pytest.approx(row, abs=0, rel=1e-12)
    [run] = run_records(remixed.folder)
    assert list(run.tags) == ["stage0"] and run.display_name == "remixed"


@pytest.mark.slow
@pytest.mark.ray
def test_a_kill_changes_no_decision(
    remixed: Road, configured_to_remix: Callable[..., Config]
) -> None:
    """Decisions of the lost part are taken again, and are the same."""
    config = configured_to_remix("remixed_killed")
    disturbed = Road(config)
    killed: list[int] = []

    def kill() -> None:
        wait_for(disturbed.checkpoints("stage0") / "step_000010" / "COMPLETE")
        while not any(
            "influence/seconds" in m and m["step"] == 12 for m in disturbed.lines("stage0")
        ):
            time.sleep(0.005)
        victim = workers()[-1]
        victim.send_signal(signal.SIGKILL)
        killed.append(victim.pid)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run(config)
    killer.join(60)
    assert killed and disturbed.json("mixture/stage0.json")["generation"] == 2
    mine, theirs = (r.json("mixture/stage0.json")["journal"] for r in (disturbed, remixed))
    assert mine == theirs
    assert not differing(weights(disturbed.final("stage0")), weights(remixed.final("stage0")))
    assert disturbed.metrics("stage0") == remixed.metrics("stage0")


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["min_weight=0.4"], "weights of 3 sources cannot all lie between min_weight 0.4"),
        (["max_weight=0.3"], "max_weight 0.3 and sum to 1 in steps of 1/4096; take min_weight up"),
        (["max_weight=0.3334"], "up to 0.3332 and max_weight from 0.3335 up"),
        (["min_weight=0.3333"], "up to 0.3332 and max_weight from 0.3335 up"),
        (
            ["probes={cod: 1}"],
            "influence.probes.cod: there is no such probe domain (nearest: 'code')",
        ),
        (["probes={code: 0}"], "the weights of all probes are 0"),
        (["min_weight=0.5", "max_weight=0.2"], "min_weight 0.5 is above max_weight 0.2"),
        (["method=cosin"], "cosine"),
        (["probes={code: -1}"], "influence.probes.code"),
    ],
)
def test_what_cannot_be_is_one_sentence(words: list[str], said: str) -> None:
    given = ["training.influence.enabled=true", *(f"training.influence.{w}" for w in words)]
    with pytest.raises(UserError) as refused:
        Config.load(overrides=given)
    assert said in str(refused.value)


def test_one_source_leaves_nothing_to_remix(tmp_path: Path) -> None:
    words = ["data=local", f"data.sources.a.path={tmp_path}", "training.influence.enabled=true"]
    with pytest.raises(UserError, match="only 1 source to train on, nothing to remix"):
        Config.load(overrides=words)


def test_a_source_of_weight_0_only_probes() -> None:
    words = ["data.sources.prose.weight=0", "data.sources.prose.probe=books"]
    config = Config.load(overrides=[*words, "training.influence.enabled=true"])
    assert config.data.remixed() == ("code", "arithmetic")
    assert config.probes("stage2") == {
        "code": ["code"], "books": ["prose"], "arithmetic": ["arithmetic"]
    }  # fmt: skip


def test_a_source_that_only_a_phase_names_is_not_dropped_without_a_word() -> None:
    """Weight 0 keeps it out of what is remixed, so the first decision would take it away."""
    words = [
        "data.sources.prose.weight=0",
        "stages.stage2.curriculum.phases=[{until: 0.5, mixture: {code: 1, prose: 1}}, {until: 1}]",
    ]
    Config.load(overrides=words)
    with pytest.raises(UserError, match=r"stage2.curriculum.phases.0.mixture.prose: influence"):
        Config.load(overrides=[*words, "stages.stage2.influence.enabled=true"])


def test_ado_needs_no_probes_and_the_others_are_told_that_there_are_none(tmp_path: Path) -> None:
    words = ["training.influence.enabled=true", "data.split.probe=0"]
    with pytest.raises(UserError, match=r"cosine compares with held-out documents, and data.split"):
        Config.load(overrides=words)
    config = Config.load(overrides=[*words, "training.influence.method=ado"])
    shards = Shards(str(tmp_path), read_manifest(prepared_without_probes(tmp_path)))
    hook = remixing(
        config, "stage2", shards, on_decision=lambda *_: None, current=dict, say=print
    )  # fmt: skip
    assert hook is not None and not hook.material.probes


def prepared_without_probes(folder: Path) -> str:
    counts = Counts(documents=9, tokens=900, rows=9)
    splits = {"train": counts, "probe": Counts(), "validation": Counts()}
    manifest = Manifest(
        job="m", length=256, group_rows=1, window=4096, tokenizer="t", vocab_size=9, eos_token_id=0,
        made_from={}, sources={name: SourceManifest(splits=splits) for name in SOURCES},
    )  # fmt: skip
    write_manifest(str(folder), manifest)
    return str(folder)


@pytest.mark.parametrize(
    "preset",
    ["stage2_pretrain", "base", "bitdistill_full", "stage3_distill", "stage3_distill_smollm2"],
)
def test_stages_2_and_3_decide_every_1000_steps(preset: str) -> None:
    config = Config.load(overrides=["model=smollm2_135m", f"training={preset}"])
    assert {stage.influence.update_interval for stage in config.stages.values()} == {1000}


def test_the_interval_follows_from_the_budget_alone() -> None:
    """(P b_p + K S b) / (0.01 B): 3 probes of 32 rows, 3 sources of 4 groups of 4, 8 a step."""
    config = Config.load(overrides=["training.influence.enabled=true"])
    assert config.influence_interval("stage2") == 1800 == (3 * 32 + 3 * 16) * 100 // 8
    assert config.influence_interval("stage1") is None
    assert Config.load().influence_interval("stage2") is None


def test_names_with_underscores_keep_apart() -> None:
    record = {"influence/weight_b": 0.5, "influence/weight_a_b": 0.5,
              "influence/score_p_b": 1.0, "influence/score_p_a_b": 2.0,
              "influence/score_p_q_b": 3.0, "influence/score_p_q_a_b": 4.0}  # fmt: skip
    assert influence_matrix(record) == {"p": {"b": 1.0, "a_b": 2.0}, "p_q": {"b": 3.0, "a_b": 4.0}}

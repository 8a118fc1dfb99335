"""What a stage's stream is told, before any worker starts; nothing of Ray runs here."""

from collections.abc import Callable
from pathlib import Path

import pytest

from bitray import Config
from bitray.data.manifest import Counts, Manifest, SourceManifest
from bitray.data.plan import SourceSize
from bitray.data.tickets import least_lead
from bitray.pipeline.groups import RowKind
from bitray.pipeline.streams import BUNDLE, check_enough, grown, stage_mixture, streams
from bitray.settings import UserError

NAMES = ("code", "prose", "arithmetic")
PHASES = (
    "stages.stage2.curriculum.phases=[{until: 0.2, mixture: {prose: 1.0}},"
    " {until: 0.201, mixture: {arithmetic: 1.0}}, {until: 1.0, mixture: {code: 1.0, prose: 3.0}}]"
)


def manifest(rows: int = 1000, done: bool = True) -> Manifest:
    counts = Counts(documents=rows, tokens=200 * rows, rows=rows)
    splits = {"train": counts, "probe": Counts(), "validation": Counts()}
    sources = {name: SourceManifest(splits=splits, done=done) for name in NAMES}
    return Manifest(
        job="m", length=256, group_rows=1, window=4096, tokenizer="t", vocab_size=9, eos_token_id=0,
        made_from={}, sources=sources,
    )  # fmt: skip


def flows_of(tmp_path: Path, *words: str, rows: int = 1000, done: bool = True) -> dict:
    config = Config.load(overrides=[f"output_dir={tmp_path}", *words])
    kind = RowKind(256, True)
    return streams(config, {kind: manifest(rows, done)}, {kind: "/rows"}, "actor")


def test_phases_begin_at_their_share_of_the_steps(tmp_path: Path) -> None:
    """90 steps: the second phase has none, the third begins after 18."""
    flows = flows_of(tmp_path, PHASES)
    stage = flows["stage2"].mixture
    assert stage.weights == {"prose": 1.0}
    assert stage.phases == ((18, {"code": 1.0, "prose": 3.0}),)
    assert flows["stage1_9"].mixture.phases == ()
    assert flows["stage1_9"].mixture.weights == pytest.approx(
        {"code": 0.4, "prose": 0.3, "arithmetic": 0.3}
    )


def test_phases_without_another_mixture_change_no_row(tmp_path: Path) -> None:
    same = "stages.stage2.curriculum.phases=[{until: 0.2}, {until: 0.6}, {until: 1.0}]"
    assert flows_of(tmp_path, same)["stage2"].mixture == flows_of(tmp_path)["stage2"].mixture
    back = "stages.stage2.curriculum.phases=[{until: 0.2, mixture: {prose: 1}}, {until: 1.0}]"
    stage = flows_of(tmp_path, back)["stage2"].mixture
    assert stage.weights == {"prose": 1.0}
    assert stage.phases == ((18, pytest.approx({"code": 0.4, "prose": 0.3, "arithmetic": 0.3})),)


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ("[{until: 0.5, mixture: {code: 1}}]", "phases end at 0.5 of the stage.*1.0"),
        ("[{until: 0.5, mixture: {code: 1}}, {until: 0.4, mixture: {code: 1}}]", "above the one"),
        ("[{until: 1.0, mixture: {prosa: 1}}]", r"no source 'prosa' \(nearest: 'prose'\)"),
        ("[{until: 1.0, mixture: {code: 0}}]", "curriculum.phases.0.mixture: they sum to zero"),
        (
            "[{until: 1.0, weights: {logit_distill: 1}}]",
            r"no objective 'logit_distill' .nearest: 'logits_distill'",
        ),
        ("[{until: 1.0, weights: {code: 1}}]", "phases.0.weights: there is no objective 'code'"),
        ("[{until: 1.0, weights: {continue_pretrain: -1}}]", "greater than or equal to 0"),
    ],
)
def test_phases_that_mean_nothing_are_refused(phases: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as error:
        Config.load(overrides=[f"training.curriculum.phases={phases}"])
    assert "Traceback" not in str(error.value)


def test_too_few_rows_are_refused_with_what_would_do(tmp_path: Path) -> None:
    """Stage 0 takes 350 steps of 8 rows, 1.9 and 2 take 30 and 90."""
    check_enough(flows_of(tmp_path, "data.max_epochs=2"))
    check_enough(flows_of(tmp_path, "data.max_epochs=1", rows=1254))
    with pytest.raises(UserError, match=r"^stages.stage2: .*at most 70 steps, or .*max_epochs=2$"):
        check_enough(flows_of(tmp_path, "data.max_epochs=1", rows=1200))
    unknown = flows_of(tmp_path, "data.max_epochs=1", rows=1200, done=False)
    check_enough(unknown)
    with pytest.raises(UserError, match="at most 70 steps"):
        check_enough(grown(unknown, {"m": dict.fromkeys(NAMES, SourceSize(1200, 240_000))}))
    one = flows_of(tmp_path, "data.max_epochs=1", "data.sources.code.max_epochs=9", rows=1200)
    check_enough(one)


def test_a_stage_after_one_that_is_left_out_begins_by_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    flows = flows_of(tmp_path)
    assert [flow.mixture.after for flow in flows.values()] == [None, "stage0", "stage1_9"]
    monkeypatch.setattr("bitray.pipeline.streams.skipped_by_name", lambda _: ["stage0", "stage1"])
    flows = flows_of(tmp_path)
    assert [flow.mixture.after for flow in flows.values()] == [None, None, "stage1_9"]


@pytest.mark.parametrize("tickets", [1, 3, 8])
def test_only_the_size_of_bundles_depends_on_the_number_of_workers(
    tickets: int, configured: Callable[..., Config]
) -> None:
    """Decisions lead by the same number of steps, and no worker waits for itself."""
    found = []
    for workers in range(1, 9):
        said = (f"scaling.num_workers={workers}", f"training.gradient_accumulation_steps={tickets}")
        config = configured("any", *said)
        mixture = stage_mixture(config, "stage2", manifest())
        assert mixture.lead >= least_lead(mixture.bundle, workers, tickets)
        reach = mixture.bundle * workers * mixture.rows_per_ticket
        assert reach <= manifest().window or mixture.bundle == 1, "training begins in one window"
        values = mixture.to_json()
        assert 1 <= values.pop("bundle") <= BUNDLE and values.pop("max_workers") == workers
        found.append(values)
    assert all(values == found[0] for values in found)

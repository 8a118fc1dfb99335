"""A run's folder belongs to one run, from the moment that there is something to lose."""

from pathlib import Path

import pytest

from bitray import Config
from bitray.pipeline.identity import claim, environment, fingerprint, mathematical_settings
from bitray.settings import UserError


def config(folder: Path, *words: str) -> Config:
    return Config.load(overrides=[f"output_dir={folder}", "experiment=mine", *words])


def test_another_run_is_refused_with_what_differs(tmp_path: Path) -> None:
    claim(config(tmp_path), {"256": {"source 'a'": "a"}})
    (tmp_path / "mine" / "stage0_checkpoint").mkdir()
    before = (tmp_path / "mine" / "fingerprint.json").read_bytes()
    with pytest.raises(UserError, match=r"data\.seed: 0 there, 5 now") as caught:
        claim(config(tmp_path, "data.seed=5"), {"256": {"source 'a'": "b"}})
    assert "prepared rows.256.source 'a': 'a' there, 'b' now" in str(caught.value)
    assert (tmp_path / "mine" / "fingerprint.json").read_bytes() == before
    assert claim(config(tmp_path, "data.seed=5", "resume.fork=true"), {"256": {"source 'a'": "b"}})


def test_what_changes_no_result_is_the_same_run(tmp_path: Path) -> None:
    first = claim(config(tmp_path), {"256": {"source 'a'": "a"}})
    (tmp_path / "mine" / "stage0_checkpoint").mkdir()
    words = ["scaling.num_workers=1", "training.log_every=3", "export.gguf=[]",
             "data.max_bad_rows=0.1", "data.max_bad_files=3"]  # fmt: skip
    assert claim(config(tmp_path, *words), {"256": {"source 'a'": "a"}}) == first


def test_how_a_global_batch_is_cut_is_no_part_of_a_run(tmp_path: Path) -> None:
    """Its rows are; and so is the cut where experts are balanced by micro-batch."""

    def identity(rows: int, tickets: int, *words: str) -> str:
        cut = (f"training.batch_size={rows}", f"training.gradient_accumulation_steps={tickets}")
        return fingerprint(mathematical_settings(config(tmp_path, *cut, *words)), {})

    assert identity(4, 2) == identity(2, 4) == identity(8, 1)
    assert identity(4, 2) != identity(4, 3)
    experts = "stages.stage2.objectives.moe.weight=0.01"
    assert identity(4, 2, experts) != identity(2, 4, experts)


def test_where_a_teacher_runs_is_no_part_of_a_run_and_what_it_says_is(tmp_path: Path) -> None:
    def identity(*words: str) -> str:
        return fingerprint(mathematical_settings(config(tmp_path, *words)), {})

    here = identity()
    assert identity("model.teacher.type=offload") == here
    assert identity("model.teacher.layout=sharded", "model.teacher.shard_above=5") == here
    others = [
        ("model.teacher.path=elsewhere",), ("model.teacher.type=four_bit",),
        ("model.teacher.type=four_bit", "model.teacher.quant_type=fp4"),
    ]  # fmt: skip
    assert len({here, *(identity(*words) for words in others)}) == 4


def test_a_run_that_never_began_may_become_another(tmp_path: Path) -> None:
    """Its data could not be read, say; the user takes the bad file away and tries again."""
    first = claim(config(tmp_path), {"256": {"source 'a'": "a"}})
    assert claim(config(tmp_path), {"256": {"source 'a'": "without the bad file"}}) != first


@pytest.mark.parametrize(
    ("variable", "value"),
    [("PATH", "/nowhere"), ("GIT_DIR", "/nowhere")],
    ids=["git", "repository"],
)
def test_a_machine_without_git_or_its_repository_runs_and_claims_nothing_of_the_sources(
    variable: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv(variable, value)
    assert claim(config(tmp_path), {})
    found = environment()
    assert found["commit"] == found["dirty"] == "unknown"
    assert "not committed" not in capsys.readouterr().out

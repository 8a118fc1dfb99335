"""The machinery of configuration, on a small root of its own."""

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from bitray.settings import Composed, Settings, UserError, merge, parse_value, parse_yaml


class Fast(Settings):
    type: Literal["fast"] = "fast"
    lr: float = 0.1
    boost: int = 2


class Slow(Settings):
    type: Literal["slow"] = "slow"
    lr: float = 0.001
    patience: float = 7.0


class Part(Settings):
    engine: Annotated[Fast | Slow, Field(discriminator="type")] = Fast()
    steps: int = 10
    mode: Literal["linear", "cosine"] = "linear"
    on: bool = False
    size: Literal[2, 3] = 2


class Root(Composed):
    default_groups = {"part": "part/small"}

    part: Part = Part()
    named: dict[str, Part] = {}
    title: str = ""


@pytest.fixture
def root(tmp_path: Path) -> type[Root]:
    (tmp_path / "part").mkdir()
    (tmp_path / "part/small.yaml").write_text("# a small one\npart: {steps: 3}\n")
    (tmp_path / "part/big.yaml").write_text(
        "# a big one\ninclude: [part/small]\npart: {on: true}\n"
    )
    return type("Here", (Root,), {"configs": tmp_path, "__annotations__": {}})


def test_groups_are_laid_down_first_and_may_include_others(root: type[Root]) -> None:
    assert root.load().part.steps == 3
    big = root.load(overrides=["part=big", "part.steps=9"]).part
    assert (big.steps, big.on) == (9, True)
    assert root.groups() == {"part": {"small": "a small one", "big": "a big one"}}


def test_a_changed_type_resets_its_node_and_siblings_apply_after_it(root: type[Root]) -> None:
    config = root.load(overrides=["part.engine.lr=0.5", "part.engine.type=fast"])
    assert config.part.engine == Fast(lr=0.5)
    slow = config.override({"part.engine.type": "slow"})
    assert slow.part.engine == Slow()  # the lr of the fast one is gone
    tuned = config.override({"part.engine.patience": 1, "part.engine.type": "slow"})
    assert tuned.part.engine == Slow(patience=1.0)


def test_the_type_that_a_node_has_resets_nothing(root: type[Root]) -> None:
    """Also where it is the default's, which nobody has named."""
    config = root.load(overrides=["part.engine.lr=0.5"]).override({"part.engine.type": "fast"})
    assert config.part.engine == Fast(lr=0.5)
    slow = root.load(overrides=["part.engine.type=slow"]).override({"part.engine.patience": 1})
    assert slow.override({"part.engine.type": "slow"}).part.engine == Slow(patience=1.0)


def test_a_group_takes_the_place_of_what_was_said_before_of_its_setting(
    root: type[Root], tmp_path: Path
) -> None:
    """Not of what is said beside it, nor of other settings."""
    saved = tmp_path / "saved.yaml"
    saved.write_text(root.load(overrides=["part=big", "part.mode=cosine", "title=kept"]).dump())
    again = root.load(str(saved), ["part=small", "part.on=true"])
    assert (again.part, again.title) == (Part(steps=3, on=True), "kept")
    assert again.override({"part": "big"}).part == Part(steps=3, on=True)
    assert root.load(str(saved)).part == Part(steps=3, on=True, mode="cosine")


def test_override_leaves_the_original_alone_and_is_frozen(root: type[Root]) -> None:
    config = root.load()
    assert config.override({"part.steps": 5}).part.steps == 5
    assert config.part.steps == 3
    with pytest.raises(Exception, match="frozen"):
        config.part.steps = 4  # type: ignore[misc]


def test_a_dump_loads_to_the_same_configuration(root: type[Root], tmp_path: Path) -> None:
    config = root.load(overrides=["part=big", "part.engine.type=slow", "title='no'"])
    (tmp_path / "saved.yaml").write_text(config.dump())
    assert root.load(str(tmp_path / "saved.yaml")).model_dump() == config.model_dump()


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["part.stepz=1"], r"part\.stepz: .*nearest: 'steps'"),
        (["parts.steps=1"], r"parts: .*nearest: 'part'"),
        (["part=bigg"], r"part=bigg: no such choice \(nearest: 'big'\); there are: big, small"),
        (["part.mode=cosin"], r"part\.mode: 'cosin' is not one of linear, cosine \(nearest"),
        (["part.engine.type=fats"], r"part\.engine\.type: 'fats' .*fast, slow \(nearest: 'fast'\)"),
        (["part.engine.patience=1"], r"part\.engine\.patience: there is no such setting"),
        (["part.steps=1.5"], r"part\.steps: .*integer.*1\.5"),
        (["part.steps=many"], r"part\.steps: .*integer.*'many'"),
        (["named.x.stepz=1"], r"named\.x\.stepz: .*nearest: 'steps'"),
        (["part.steps"], r"'part\.steps': expected key=value"),
        (["part.engine=5"], r"part\.engine: "),
        (["named=5"], r"named: takes settings by name, not 5"),
        (["named.x=5"], r"named\.x: takes settings by name, not 5"),
        (["part.size=4"], r"part\.size: 4 is not one of 2, 3$"),
        (["title={a: 1, a: 2}"], r"title: line 1: 'a' was already given on line 1"),
    ],
)
def test_every_mistake_has_its_sentence(root: type[Root], words: list[str], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        root.load(overrides=words)


def test_all_problems_are_told_at_once(root: type[Root]) -> None:
    with pytest.raises(UserError) as caught:
        root.load(overrides=["part.stepz=1", "part.mode=cosin", "named.x.steps=no"])
    assert str(caught.value).startswith("3 problems")
    assert all(word in str(caught.value) for word in ("stepz", "cosin", "named.x.steps"))


@pytest.mark.parametrize(
    "words",
    [
        ["parts=big", "title=[1]"],
        ["part=bigg", "title=[1]", "part.stepz=3"],
        ["steps", "part=", "parts.steps=1", "title=[1]"],
    ],
)
def test_words_that_cannot_be_read_do_not_hide_the_others(
    root: type[Root], words: list[str]
) -> None:
    """One sentence for each, and none for what only follows from them."""
    with pytest.raises(UserError) as caught:
        root.load(overrides=words)
    assert str(caught.value).startswith(f"{len(words)} problems:\n"), caught.value


def test_files_are_told_with_their_line(root: type[Root], tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("part:\n  steps: 1\n  moode: linear\n")
    with pytest.raises(UserError, match=r"part\.moode \(.*mine\.yaml, line 3\)"):
        root.load(str(path))
    path.write_text("part:\n  steps: 1\n  steps: 2\n")
    with pytest.raises(UserError, match=r"mine\.yaml, line 3: 'steps' was already given on line 2"):
        root.load(str(path))
    path.write_text("part:\n\tsteps: 1\n")
    with pytest.raises(UserError, match=r"mine\.yaml, line 2: .*spaces, not tabs"):
        root.load(str(path))
    with pytest.raises(UserError, match=r"no such file \(nearest: 'mine\.yaml'\)"):
        root.load(str(tmp_path / "mini.yaml"))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (b"title: \xe9\n", r"--config .*mine\.yaml: not UTF-8 text"),
        (b"groups: 5\n", r"groups \(.*mine\.yaml\): takes choices by name, .* not 5"),
        (b"groups: {parts: big}\n", r"groups\.parts: there is no such group \(nearest: 'part'\)"),
        (b"? [a, b]\n: 1\n", r"mine\.yaml, line 1: found unhashable key"),
        (b"title: a\x00b\n", r"mine\.yaml: unacceptable character"),
        (b"part: 5\n", r"part \(.*mine\.yaml, line 1\): takes settings by name, not 5"),
        (b"5: 6\n", r"5 \(.*mine\.yaml, line 1\): there is no such setting"),
    ],
)
def test_a_file_that_is_no_configuration_has_its_sentence(
    root: type[Root], tmp_path: Path, text: bytes, sentence: str
) -> None:
    path = tmp_path / "mine.yaml"
    path.write_bytes(text)
    with pytest.raises(UserError, match=sentence) as caught:
        root.load(str(path))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1.0e-3", 1e-3), ("3", 3), ("3.", 3.0), (".5", 0.5), ("no", "no"),
     ("true", True), ("null", None), ("[1, 2]", [1, 2]), ("1_000", 1000), ("a: [", "a: ["),
     ("1.2.3", "1.2.3"), ("-2e5", -2e5), ("2026-01-01x", "2026-01-01x"),
     ("2026-13-45", "2026-13-45"), ("2026-01-01", "2026-01-01")],
)  # fmt: skip
def test_values_are_read_as_people_mean_them(text: str, value: object) -> None:
    assert parse_value(text) == value and type(parse_value(text)) is type(value)


def test_lines_are_known_for_every_path() -> None:
    tree, lines = parse_yaml("a:\n  b: 1\nc: 2\n", "here")
    assert tree == {"a": {"b": 1}, "c": 2}
    assert lines == {("a",): 1, ("a", "b"): 2, ("c",): 3}


def test_merge_keeps_what_the_other_does_not_speak_of() -> None:
    assert merge({"a": {"x": 1, "y": 2}}, {"a": {"y": 3}}) == {"a": {"x": 1, "y": 3}}
    assert merge({"a": 1}, {"a": {"y": 3}}) == {"a": {"y": 3}}

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
    ("text", "value"),
    [("1e-4", 1e-4), ("1.0e-3", 1e-3), ("3", 3), ("3.", 3.0), (".5", 0.5), ("no", "no"),
     ("true", True), ("null", None), ("[1, 2]", [1, 2]), ("1_000", 1000), ("a: [", "a: ["),
     ("1.2.3", "1.2.3"), ("-2e5", -2e5), ("2026-01-01x", "2026-01-01x")],
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

"""Filters keep what they say; templates make prompts and completions; wrong rows are told."""

import json

import pytest
from pydantic import ValidationError

from bitray.data.rows import Filter, Found, RowSettings

ROW = {"q": "Why?", "a": "So.", "score": 3, "share": 0.5, "label": 1, "none": None, "list": [1]}


def found(row: dict = ROW, **settings: object) -> Found:
    return RowSettings(**settings).found("here", lambda: row)


@pytest.mark.parametrize(
    ("condition", "kept"),
    [
        ({"score": {"at_least": 3}}, True),
        ({"score": {"at_least": 3.5}}, False),
        ({"score": {"at_most": 2}}, False),
        ({"share": {"at_least": 0.1, "at_most": 0.6}}, True),
        ({"q": {"equals": "Why?"}}, True),
        ({"q": {"equals": "why?"}}, False),
        ({"score": {"one_of": [1, 3]}}, True),
        ({"q": {"one_of": ["a", "b"]}}, False),
        ({"q": {"min_length": 4, "max_length": 4}}, True),
        ({"q": {"min_length": 5}}, False),
        ({"none": {"max_length": 5}}, False),
        ({"score": {"at_least": 3}, "a": {"max_length": 2}}, False),
    ],
)
def test_a_row_stays_if_it_meets_every_filter(condition: dict, kept: bool) -> None:
    expected = Found("here", "Why?") if kept else Found("here", None)
    assert found(columns="q", filters=condition) == expected


@pytest.mark.parametrize(
    ("condition", "problem"),
    [
        ({"q": {"at_least": 3}}, "column 'q' holds str, not a number"),
        ({"score": {"min_length": 3}}, "column 'score' holds int, not text"),
        ({"scor": {"at_least": 3}}, "no column 'scor' (nearest: 'score'), it has: q, a"),
    ],
)
def test_a_filter_on_what_is_not_there_is_a_bad_row(condition: dict, problem: str) -> None:
    result = found(columns="q", filters=condition)
    assert result.text is None and problem in result.problem


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ({}, "says nothing; give one of at_least"),
        ({"at_least": 2, "at_most": 1}, r"at_least \(2.0\) is above at_most"),
        ({"min_length": 2, "max_length": 1}, "so no row stays"),
        ({"at_last": 1}, "Extra inputs"),
    ],
)
def test_a_filter_that_means_nothing_is_refused(condition: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        Filter(**condition)


def test_a_prompt_is_filled_and_kept_apart() -> None:
    made = found(prompt="Q: {q} {{{score}}} {share}\nA:", completion=" {a}")
    assert (made.prompt, made.text) == ("Q: Why? {3} 0.5\nA:", " So.")
    assert found(prompt="{q}", completion="a").text == "So.", "a column's name"


def test_labels_name_integers_in_the_completion_only() -> None:
    made = found(prompt="{label}:", completion="{q} is {label}", labels=("bad", "good"))
    assert (made.prompt, made.text) == ("1:", "Why? is good")
    wrong = found({**ROW, "label": -1}, prompt="x", completion="{label}", labels=("bad", "good"))
    assert wrong.problem == "column 'label' holds -1, but labels has only 2 names"


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"prompt": "{qq}", "completion": "a"}, "no column 'qq' (nearest: 'q')"),
        ({"prompt": "{q}", "completion": "{b}"}, "no column 'b'"),
        ({"prompt": "{list}", "completion": "a"}, "column 'list' holds list, not text or a number"),
        ({"prompt": "{q}", "completion": "none"}, "column 'none' holds NoneType, not text"),
        ({"prompt": "q", "completion": "share", "labels": ("x",)}, "'share' holds float, not a la"),
        ({"columns": ("q", "score")}, "column 'score' holds int, not text"),
    ],
)
def test_rows_that_do_not_fit_are_told(settings: dict, problem: str) -> None:
    made = found(**settings)
    assert made.text is None and problem in made.problem


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"prompt": "{q}"}, "prompt and completion go together"),
        ({"completion": "a"}, "prompt and completion go together"),
        ({"labels": ["a"]}, "there is no completion"),
        ({"prompt": "{q", "completion": "a"}, "expected '}'"),
        ({"prompt": "{}", "completion": "a"}, "a place is {column}"),
        ({"prompt": "{q:>10}", "completion": "a"}, "a place is {column}"),
        ({"columns": []}, "at least 1 item"),
    ],
)
def test_settings_that_mean_nothing_are_refused(settings: dict, sentence: str) -> None:
    with pytest.raises(ValidationError, match=sentence):
        RowSettings(**settings)


def test_only_the_columns_that_are_looked_at_are_needed() -> None:
    filters = {"score": {"at_least": 1}, "a": {"min_length": 1}}
    assert RowSettings(columns=("q", "a"), filters=filters).needed == ["q", "a", "score"]
    templates = {"prompt": "{q} {q}", "completion": "{a}"}
    assert RowSettings(**templates, filters=filters).needed == ["q", "a", "score"]


def test_settings_survive_json() -> None:
    given = RowSettings(
        prompt="{q}", completion="a", filters={"s": {"one_of": [1, "1", True, 0.5]}}
    )
    again = RowSettings.model_validate(json.loads(json.dumps(given.model_dump(mode="json"))))
    assert again == given
    assert [type(one) for one in again.filters["s"].one_of] == [int, str, bool, float]

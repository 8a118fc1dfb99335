"""What of a row makes a document: columns joined, or a prompt with its completion; and filters."""

import json
import math
from collections.abc import Callable, Mapping
from functools import lru_cache
from string import Formatter
from typing import Any, NamedTuple

from pydantic import Field, field_validator, model_validator

from bitray.settings import Settings, nearest

Row = Mapping[str, Any]
Number = int | float
Scalar = bool | Number | str


class Found(NamedTuple):
    """A document's text; or None: with the problem with it, or because a filter left it out."""

    place: str
    text: str | None
    problem: str = ""
    prompt: str = ""
    """Comes before the text, and is read but not learnt."""
    is_file: bool = False
    """The problem is that of the whole file that `place` names, of which nothing more comes."""

    @property
    def is_document(self) -> bool:
        """Whether there is something to learn in it."""
        return bool(self.text) and not str(self.text).isspace()


class BadRow(Exception):
    """One row that is no document."""


class Filter(Settings):
    """Conditions on a column; a row stays if it meets all of them. No value meets none."""

    at_least: float | None = None
    at_most: float | None = None
    equals: Scalar | None = None
    one_of: tuple[Scalar, ...] = ()
    min_length: int | None = Field(None, ge=0)
    """Characters of text."""
    max_length: int | None = Field(None, ge=0)

    @model_validator(mode="after")
    def _can_be_met(self) -> "Filter":
        for low, high in (("at_least", "at_most"), ("min_length", "max_length")):
            least, most = getattr(self, low), getattr(self, high)
            if least is not None and most is not None and least > most:
                raise ValueError(f"{low} ({least}) is above {high} ({most}), so no row stays")
        if not self.model_dump(exclude_defaults=True):
            raise ValueError(f"says nothing; give one of {', '.join(Filter.model_fields)}")
        return self

    def keeps(self, column: str, value: Any) -> bool:
        """Whether a row with this value stays. `BadRow` for a value of the wrong kind."""
        if value is None:
            return False
        if (self.at_least, self.at_most) != (None, None):
            _check(column, value, Number, "a number")
            if not _between(self.at_least, value, self.at_most):
                return False
        if (self.min_length, self.max_length) != (None, None):
            _check(column, value, str, "text")
            if not _between(self.min_length, len(value), self.max_length):
                return False
        wanted = self.one_of if self.equals is None else (self.equals,)
        return not wanted or value in wanted


class RowSettings(Settings):
    """How a source's rows become documents."""

    columns: tuple[str, ...] = Field(("text",), min_length=1)
    """The columns that make a document, joined in this order."""
    separator: str = "\n\n"
    """Between joined columns."""
    prompt: str | None = None
    """Instead of `columns`: text with `{column}` places, which is read but not learnt."""
    completion: str | None = None
    """What is learnt after the prompt: text with `{column}` places, or a column."""
    labels: tuple[str, ...] = ()
    """Names of the integers 0, 1, ... that the completion's columns hold."""
    filters: dict[str, Filter] = {}
    """By column: which rows are kept."""

    @field_validator("columns", mode="before")
    @classmethod
    def _one_column(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("prompt", "completion", mode="before")
    @classmethod
    def _is_template(cls, value: Any) -> Any:
        if isinstance(value, dict):
            raise ValueError("YAML reads this as a mapping, not as text; put it into quotes")
        _places(value or "")
        return value

    @model_validator(mode="after")
    def _goes_together(self) -> "RowSettings":
        if (self.prompt is None) != (self.completion is None):
            raise ValueError("prompt and completion go together; only one of them is given")
        if self.labels and self.completion is None:
            raise ValueError("labels name what a completion holds, but there is no completion")
        return self

    @property
    def needed(self) -> list[str]:
        """All columns that are looked at."""
        used = [*self.columns]
        if self.prompt is not None:
            places = (*_places(self.prompt), *self._completion)
            used = [column for _, column in places if column is not None]
        return list(dict.fromkeys([*used, *self.filters]))

    @property
    def answers(self) -> tuple[str, ...]:
        """The completion with each label in its one place; none where there are no labels."""
        columns = [column for _, column in self._completion if column] if self.labels else []
        if len(columns) != 1:
            return ()
        every = range(len(self.labels))
        return tuple(_filled(self._completion, {columns[0]: k}, self.labels) for k in every)

    def found(self, place: str, row: Callable[[], Row]) -> Found:
        """The document of a row, or what is wrong with it. A lone surrogate cannot be encoded."""
        try:
            pair = self._document(row())
            if pair is None:
                return Found(place, None)
            for text in pair:
                text.encode()
        except json.JSONDecodeError as error:
            return Found(place, None, f"not JSON: {error.msg}")
        except UnicodeError:
            return Found(place, None, "not valid UTF-8")
        except RecursionError:
            return Found(place, None, "not JSON: nested too deeply")
        except BadRow as error:
            return Found(place, None, str(error))
        return Found(place, pair[1], prompt=pair[0])

    def _document(self, row: Row) -> tuple[str, str] | None:
        """Prompt and text, or None if a filter leaves the row out."""
        if not all(f.keeps(column, _cell(row, column)) for column, f in self.filters.items()):
            return None
        if self.prompt is None:
            texts = (_text(row, column) for column in self.columns)
            return "", self.separator.join(text for text in texts if text)
        return _filled(_places(self.prompt), row), _filled(self._completion, row, self.labels)

    @property
    def _completion(self) -> "Places":
        assert self.completion is not None
        places = _places(self.completion)
        return places if any(column for _, column in places) else (("", self.completion),)


Places = tuple[tuple[str, str | None], ...]
"""Pieces of a template: literal text, and the column that follows it."""


@lru_cache(maxsize=256)
def _places(template: str) -> Places:
    pieces = tuple(Formatter().parse(template))
    for _, column, layout, conversion in pieces:
        if column is not None and (not column or layout or conversion):
            raise ValueError(f"{template!r}: a place is {{column}}, with nothing but a name")
    return tuple((literal, column) for literal, column, _, _ in pieces)


def _filled(places: Places, row: Row, labels: tuple[str, ...] = ()) -> str:
    return "".join(
        literal + ("" if column is None else _printed(row, column, labels))
        for literal, column in places
    )


def _printed(row: Row, column: str, labels: tuple[str, ...]) -> str:
    """A value in a template; an integer by its name, if there are names."""
    value = _cell(row, column)
    if not labels or isinstance(value, str):
        _check(column, value, str | Number, "text or a number")
        return str(value)
    _check(column, value, int, "a label's number")
    if not 0 <= value < len(labels):
        raise BadRow(f"column '{column}' holds {value}, but labels has only {len(labels)} names")
    return labels[value]


def _text(row: Row, column: str) -> str:
    value = _cell(row, column)
    if value is None:
        return ""
    _check(column, value, str, "text")
    return str(value)


def _cell(row: Row, column: str) -> Any:
    if column not in row:
        raise BadRow(f"no column '{column}'{nearest(column, row)}, it has: {', '.join(row)[:80]}")
    return row[column]


def _check(column: str, value: Any, kind: Any, name: str) -> None:
    if not isinstance(value, kind):
        raise BadRow(f"column '{column}' holds {type(value).__name__}, not {name}")


def _between(least: Number | None, value: Number, most: Number | None) -> bool:
    return (-math.inf if least is None else least) <= value <= (math.inf if most is None else most)

"""One parameter of a search space: its kind and values, and how Ax sees them.

Rates are searched in log10, linearly, so that constraints may speak of them; Ax sees plain names,
`stages__stage2__optimizer__lr`.
"""

import math
import re
from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, model_validator

from bitray.settings import Settings

Number = int | float
Scalar = StrictBool | StrictInt | StrictFloat | StrictStr
Finite = Annotated[float, Field(allow_inf_nan=False)]
Interval = tuple[Finite, Finite]
Integers = tuple[StrictInt, StrictInt]
KINDS = ("uniform", "loguniform", "int", "choice", "ordered", "fixed", "derived")
INNER = 0.377
"""Where between its bounds a parameter is tried at load: no whole number there by chance."""


class Parameter(Settings):
    """One setting of the run; exactly one of the kinds, and when it matters."""

    uniform: Interval | None = None
    loguniform: Interval | None = None
    int: Integers | None = None
    choice: tuple[Scalar, ...] | None = None
    """Values without an order."""
    ordered: tuple[StrictInt | StrictFloat, ...] | None = None
    """Ascending numbers, of which neighbours are alike."""
    fixed: Any = None
    derived: str | None = None
    """A linear expression in other parameters, such as `1 - a - b`."""
    when: dict[str, Scalar | tuple[Scalar, ...]] = {}
    """A `choice` or `ordered` parameter, and its value or values with which this one matters."""

    @model_validator(mode="after")
    def _makes_sense(self) -> "Parameter":
        given = [kind for kind in KINDS if kind in self.model_fields_set]
        if len(given) != 1:
            said = f"not {' and '.join(given)}" if given else "none is given"
            raise ValueError(f"give one of {', '.join(KINDS)}; {said}")
        problem = self._bounds_problem() or self._values_problem()
        if problem:
            raise ValueError(problem)
        if len(self.when) > 1:
            raise ValueError("when: name one parameter; conditions on two are nested, one in one")
        return self

    def _bounds_problem(self) -> str | None:
        if self.bounds is None:
            return None
        low, high = self.bounds
        if low >= high:
            return f"{self.kind}: the lower bound {low:g} is not below the upper one {high:g}"
        if self.loguniform and low <= 0:
            return f"loguniform: {low:g} has no logarithm; bounds must be above 0"
        return None

    def _values_problem(self) -> str | None:
        if self.kind not in ("choice", "ordered"):
            return None
        if len(set(map(repr, self.values))) < max(2, len(self.values)):
            return f"{self.kind}: give at least two values, each once; fixed is for a single one"
        if self.ordered and list(self.ordered) != sorted(self.ordered):
            return "ordered: the values must ascend"
        return None

    @property
    def kind(self) -> str:
        """Which of `KINDS` it is."""
        return next(kind for kind in KINDS if kind in self.model_fields_set)

    @property
    def bounds(self) -> tuple[Number, Number] | None:
        """Of an interval."""
        return self.uniform or self.loguniform or self.int

    @property
    def values(self) -> tuple[Any, ...]:
        """Of a finite choice."""
        return self.choice or self.ordered or ()

    @property
    def searched(self) -> bool:
        """Whether Ax decides about it."""
        return self.kind not in ("fixed", "derived")

    @property
    def condition(self) -> tuple[str, tuple[Any, ...]] | None:
        """The parameter that decides whether this one matters, and with which of its values."""
        for path, said in self.when.items():
            return path, said if isinstance(said, tuple) else (said,)
        return None

    def tried(self) -> tuple[Any, ...]:
        """Values that have to be legal if all between them are to be."""
        if self.bounds is None:
            return (self.fixed,) if self.kind == "fixed" else self.values
        low, high = self.bounds
        if self.int:
            return (low, high)
        if self.loguniform:
            return (low, low * (high / low) ** INNER, high)
        return (low, low + INNER * (high - low), high)


# ------------------------------------------------------------------------------ names and scales


def name_of(path: str) -> str:
    """Ax parses names, and dots are operators there."""
    return re.sub(r"\W", "__", path)


def labels(paths: Iterable[str]) -> dict[str, str]:
    """Short names for people: the shortest ends of two words or more that tell paths apart."""
    parts = {path: path.split(".") for path in paths}
    found = {}
    for path, own in parts.items():
        size = 2
        while sum(each[-size:] == own[-size:] for each in parts.values()) > 1:
            size += 1
        found[path] = ".".join(own[-size:])
    return found


def encoded(parameter: Parameter, value: Any) -> Any:
    """A setting as Ax sees it: rates as log10, mixed choices as text."""
    if parameter.loguniform:
        return math.log10(value)
    return value if parameter.values == () or not mixed(parameter) else repr(value)


def decoded(parameter: Parameter, value: Any) -> Any:
    """A setting from what Ax says; within its bounds to the last bit."""
    if parameter.loguniform:
        low, high = parameter.loguniform
        return min(max(10.0**value, low), high)
    if parameter.values:
        return next(each for each in parameter.values if encoded(parameter, each) == value)
    return value


def mixed(parameter: Parameter) -> bool:
    """Whether values are of several types, which Ax does not take."""
    return len({type(value) for value in parameter.values}) > 1


def holds(parameter: Parameter, value: Any) -> bool:
    if parameter.bounds is None:
        return any(repr(value) == repr(each) for each in parameter.values)
    low, high = parameter.bounds
    return isinstance(value, (int, float)) and low <= value <= high

"""Linear expressions in settings, as constraints and derived parameters are written."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_PATH = r"[A-Za-z_][\w.]*"
_TERM = re.compile(
    rf"\s*(?P<sign>[-+]?)\s*(?:(?P<number>{_NUMBER})\s*(?P<times>\*)?\s*)?"
    rf"(?:log10\(\s*(?P<log>{_PATH})\s*\)|(?P<path>{_PATH}))?\s*"
)


@dataclass(frozen=True)
class Linear:
    """`sum(terms) + sum(logs) + constant`, coefficients by path; `logs` are of log10(path)."""

    terms: Mapping[str, float]
    logs: Mapping[str, float]
    constant: float

    def __sub__(self, other: "Linear") -> "Linear":
        return Linear(
            _difference(self.terms, other.terms),
            _difference(self.logs, other.logs),
            self.constant - other.constant,
        )

    @property
    def paths(self) -> list[str]:
        """All settings that it speaks of."""
        return [*self.terms, *(path for path in self.logs if path not in self.terms)]

    def value(self, values: Mapping[str, float]) -> float:
        """Of an expression without logarithms; rounded, so that 1 - 0.7 - 0.3 is 0."""
        assert not self.logs
        return round(self.constant + sum(c * values[p] for p, c in self.terms.items()), 12) + 0.0


def linear(text: str) -> Linear:
    """Read `1 - 0.5 * a.b - log10(c.d)`; `ValueError` for what is not linear."""
    terms: dict[str, float] = {}
    logs: dict[str, float] = {}
    constant, at = 0.0, 0
    while at < len(text):
        found = _TERM.match(text, at)
        assert found is not None  # all of it is optional
        path = found["path"] or found["log"]
        bare = found["number"] is None and path is None
        glued = bool(found["number"] and path) != bool(found["times"])
        if bare or glued or (at and not found["sign"]):
            raise ValueError(
                f"'{text.strip()}' is not linear at '{text[at:].strip()}': write terms such as "
                "0.5 * path, path, log10(path) or 1, joined by + and -"
            )
        factor = float(found["number"] or 1) * (-1 if found["sign"] == "-" else 1)
        if path is None:
            constant += factor
        else:
            kind = logs if found["log"] else terms
            kind[path] = kind.get(path, 0.0) + factor
        at = found.end()
    if not text.strip():
        raise ValueError("an expression is missing")
    return Linear(terms, logs, constant)


def at_most_zero(text: str) -> Linear:
    """`a <= b` or `a >= b` as an expression that has to be at most 0."""
    sides = re.split(r"(<=|>=)", text)
    if len(sides) != 3:
        raise ValueError(f"'{text}' is no constraint: write one '<=' or '>=' between two sides")
    left, right = linear(sides[0]), linear(sides[2])
    return left - right if sides[1] == "<=" else right - left


def _difference(left: Mapping[str, float], right: Mapping[str, float]) -> dict[str, float]:
    both = {key: left.get(key, 0.0) - right.get(key, 0.0) for key in [*left, *right]}
    return {key: value for key, value in both.items() if value}

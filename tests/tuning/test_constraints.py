"""Linear expressions, against Python's own arithmetic."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitray.tuning.linear import at_most_zero, linear

number = st.floats(-100, 100).map(lambda x: round(x, 3))
values = {"a": 0.3, "b.c": 1.7, "d_1.e2": -4.0}


def evaluated(expression, said=values) -> float:
    logs = sum(c * math.log10(said[p]) for p, c in expression.logs.items())
    return expression.constant + sum(c * said[p] for p, c in expression.terms.items()) + logs


@given(st.lists(st.tuples(number, st.sampled_from([*values, None])), min_size=1))
def test_a_sum_is_read_as_it_is_written(terms) -> None:
    text = " + ".join(f"{c:f} * {p}" if p else f"{c:f}" for c, p in terms).replace("+ -", "- ")
    expected = sum(c * (values[p] if p else 1.0) for c, p in terms)
    assert evaluated(linear(text)) == pytest.approx(expected, abs=1e-6)


def test_logarithms_and_both_directions() -> None:
    said = at_most_zero("log10(b.c) - 2*a >= 1e-1")
    assert evaluated(said) == pytest.approx(0.1 - math.log10(1.7) + 0.6)
    assert evaluated(at_most_zero("a <= b.c")) == pytest.approx(0.3 - 1.7)


def test_what_is_left_of_one_is_exact() -> None:
    assert linear("1 - a - b.c").value({"a": 0.7, "b.c": 0.3}) == 0.0


@pytest.mark.parametrize(
    "text", ["a * b", "a b", "2 a", "2 *", "a + + b", "", "a +", "a / 2", "a < b"]
)
def test_anything_else_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"linear|missing"):
        linear(text)


@pytest.mark.parametrize("text", ["a", "a <= b <= c", "a == b"])
def test_a_constraint_has_two_sides(text: str) -> None:
    with pytest.raises(ValueError, match="no constraint"):
        at_most_zero(text)

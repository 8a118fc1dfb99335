"""Limits list the same units, cut at the same place, however the work is spread."""

import random
from dataclasses import dataclass

from hypothesis import given
from hypothesis import strategies as st

from bitray.data.formats import Part
from bitray.data.limits import Left, Taken
from bitray.data.sources import SourceSettings, Unit


@dataclass(frozen=True)
class Done:
    documents: int
    tokens: int
    cut: bool


def do(unit: Unit, sizes: list[int]) -> Done:
    """A unit's documents, of these sizes, as far as its limits allow."""
    left, taken = Left(unit.documents, unit.tokens), 0
    for number, size in enumerate(sizes):
        if not left.fits(1, size):
            return Done(number, taken, True)
        left, taken = left.less(1, size), taken + size
    return Done(len(sizes), taken, False)


def expected(units: list[list[int]], source: SourceSettings) -> list[tuple[int, int]]:
    """Documents and tokens per unit, counted one document after the other."""
    most = (source.max_documents or 10**9, source.max_tokens or 10**9)
    total, found = (0, 0), []
    for sizes in units:
        mine = (0, 0)
        for size in sizes:
            after = (total[0] + 1, total[1] + size)
            if after[0] > most[0] or after[1] > most[1]:
                return [*found, mine]
            total, mine = after, (mine[0] + 1, mine[1] + size)
        found.append(mine)
    return found


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=12),
    st.none() | st.integers(1, 40),
    st.none() | st.integers(1, 150),
    st.integers(0, 9),
)
def test_what_is_listed_is_what_counting_one_by_one_gives(
    contents: list[list[int]], max_documents: int | None, max_tokens: int | None, seed: int
) -> None:
    source = SourceSettings(max_documents=max_documents, max_tokens=max_tokens)
    units = [
        Unit("s", number, (Part("u", 0, None, 1 + 2 * sum(sizes)),))
        for number, sizes in enumerate(contents)
    ]
    taken: Taken[Done] = Taken(source, units)
    draw = random.Random(seed)
    rounds = 0
    while some := taken.missing():
        rounds += 1
        draw.shuffle(some)
        if draw.random() < 0.3:
            some = some[: draw.randint(1, len(some))]  # the others were interrupted
        for unit in some:
            taken.add(unit.number, do(unit, contents[unit.number]))
        assert rounds < 100
    assert taken.done
    found = [(one.documents, one.tokens) for one in taken.results]
    counted = expected(contents, source)
    while len(counted) > len(found) and counted[-1] == (0, 0):
        counted.pop()  # units after the end of a source may be looked into, or not
    while len(found) > len(counted) and found[-1] == (0, 0):
        found.pop()
    assert found == counted


def test_a_source_without_limits_is_done_at_once() -> None:
    units = [Unit("s", number, (Part("u", 0, None, 9),)) for number in range(5)]
    taken: Taken[Done] = Taken(SourceSettings(), units)
    assert taken.missing() == units
    taken.add(1, Done(1, 1, False))
    assert [unit.number for unit in taken.missing()] == [0, 2, 3, 4] and not taken.done


def test_few_rounds_are_enough_and_hardly_any_work_is_in_vain() -> None:
    """1,000 units of about 1,000 tokens, of which a tenth is wanted."""
    draw = random.Random(0)
    contents = [[draw.randint(50, 150) for _ in range(10)] for _ in range(1000)]
    units = [Unit("s", k, (Part("u", 0, None, 4 * sum(c)),)) for k, c in enumerate(contents)]
    source = SourceSettings(max_tokens=100_000)
    taken: Taken[Done] = Taken(source, units)
    rounds = work = 0
    while some := taken.missing():
        rounds, work = rounds + 1, work + len(some)
        for unit in some:
            taken.add(unit.number, do(unit, contents[unit.number]))
    assert rounds <= 6
    assert work <= len(taken.results) + 2

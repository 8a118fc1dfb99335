"""Packing loses nothing, cuts only what is too long, and leaves hardly any padding."""

import itertools
import random
from bisect import bisect_left, insort

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitray.data import Packer, Row, pack
from bitray.settings import UserError


def numbered(sizes: list[int]) -> list[np.ndarray]:
    """Documents whose tokens are all different, so that each can be found again."""
    ends = np.cumsum([1, *sizes])
    return [np.arange(a, b, dtype=np.int32) for a, b in itertools.pairwise(ends)]


def pieces(row: Row) -> list[list[int]]:
    ends = np.cumsum([0, *row.lengths])
    return [row.input_ids[a:b].tolist() for a, b in itertools.pairwise(ends)]


def offline(sizes: list[int], length: int) -> int:
    """Rows of best fit decreasing over everything: what no stream can beat by much."""
    rows, room = 0, []
    whole = sum(size // length for size in sizes)
    for size in sorted((size % length for size in sizes), reverse=True):
        if not size:
            continue
        best = bisect_left(room, size)
        if best == len(room):
            rows += 1
            insort(room, length - size)
        else:
            insort(room, room.pop(best) - size)
    return rows + whole


def padding(sizes: list[int], length: int, rows: int) -> float:
    return 1 - sum(sizes) / (rows * length)


@given(
    st.lists(st.tuples(st.integers(0, 40), st.integers(1, 40)), max_size=40),
    st.integers(1, 24),
    st.integers(0, 4),
)
def test_prompts_give_way_to_completions_and_no_row_holds_nothing_to_learn(
    sizes: list[tuple[int, int]], length: int, open_bins: int
) -> None:
    """Every completion's tokens come out once, behind as much of its prompt's end as has room."""
    documents = numbered([prompt + completion for prompt, completion in sizes])
    packer = Packer(length, open_bins)
    rows = [
        row
        for document, (prompt, _) in zip(documents, sizes, strict=True)
        for row in packer.add(document, prompt)
    ]
    rows += packer.flush()
    found = {}
    for row in rows:
        for piece, prompt in zip(pieces(row), row.prompts, strict=True):
            assert prompt < len(piece)
            found[piece[0]] = (piece, prompt)
    expected = []
    for document, (prompt, completion) in zip(documents, sizes, strict=True):
        kept = min(prompt, max(length - completion, 0))
        learnt = document[prompt - kept :].tolist()
        expected += [
            (learnt[at : at + length], 0 if at else kept) for at in range(0, len(learnt), length)
        ]
    assert [found[key] for key in sorted(found)] == expected
    assert packer.truncated == sum(prompt + completion > length for prompt, completion in sizes)


@given(st.lists(st.integers(0, 70), max_size=60), st.integers(1, 24), st.integers(1, 4))
def test_every_token_comes_out_once_and_only_long_documents_are_cut(sizes, length, open_bins):
    documents = numbered(sizes)
    rows = list(pack(documents, length, open_bins))
    out = sorted((piece for row in rows for piece in pieces(row)), key=lambda piece: piece[0])
    expected = [
        document[at : at + length].tolist()
        for document in documents
        for at in range(0, len(document), length)
    ]
    assert out == expected
    for row in rows:
        assert row.input_ids.dtype == np.int32
        assert len(row.input_ids) == length
        assert row.lengths
        assert min(row.lengths) > 0
        assert not row.input_ids[sum(row.lengths) :].any()
        firsts = [piece[0] for piece in pieces(row)]
        assert firsts == sorted(firsts), "documents keep their order within a row"


def test_the_same_documents_give_the_same_rows():
    sizes = [random.Random(0).randint(1, 300) for _ in range(500)]
    first, second = ([r.input_ids for r in pack(numbered(sizes), 128)] for _ in range(2))
    assert np.array_equal(first, second)


def test_lists_do_as_well_as_arrays():
    documents = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    wanted = [(r.input_ids.tolist(), r.lengths) for r in pack(documents, 4)]
    arrays = [np.array(document, np.int64) for document in documents]
    assert [(r.input_ids.tolist(), r.lengths) for r in pack(arrays, 4)] == wanted


def test_a_document_of_ten_rows_becomes_ten_full_rows():
    rows = list(pack(numbered([40]), 4))
    assert [row.lengths for row in rows] == [[4]] * 10


def test_an_endless_stream_gives_rows():
    """Memory is bounded: rows come before the stream ends."""
    endless = ([7] * size for size in itertools.cycle([3, 50, 11, 90]))
    assert len(list(itertools.islice(pack(endless, 64), 1000))) == 1000


def test_nothing_gives_nothing():
    assert list(pack([], 8)) == []
    assert list(pack([[], []], 8)) == []


def test_without_bins_every_document_has_a_row_of_its_own():
    rows = list(pack([[1, 2], [3], [4] * 5], 4, open_bins=0))
    assert [row.lengths for row in rows] == [[2], [1], [4], [1]]
    assert [row.input_ids.tolist() for row in rows] == [
        [1, 2, 0, 0], [3, 0, 0, 0], [4, 4, 4, 4], [4, 0, 0, 0]
    ]  # fmt: skip


@pytest.mark.parametrize(("length", "open_bins"), [(0, 32), (8, -1)])
def test_impossible_sizes_are_refused(length, open_bins):
    with pytest.raises(UserError, match="packing needs length >= 1"):
        list(pack([[1]], length, open_bins))


MIXES = {
    "mixed": lambda rng: int(rng.lognormvariate(6, 1.1)) + 1,
    "short": lambda rng: int(rng.gauss(170, 55)) % 500 + 20,
    "long": lambda rng: int(rng.lognormvariate(8.5, 1)) + 1,
}


@pytest.mark.parametrize("length", [512, 2048])
@pytest.mark.parametrize("kind", MIXES)
@pytest.mark.parametrize("count", [100, 2000])
def test_padding_is_close_to_packing_offline(kind, count, length):
    rng = random.Random(count)
    sizes = [MIXES[kind](rng) for _ in range(count)]
    rows = sum(1 for _ in pack(numbered(sizes), length))
    assert padding(sizes, length, rows) <= padding(sizes, length, offline(sizes, length)) + 0.015


@pytest.mark.parametrize("length", [512, 2048])
def test_a_big_mixed_source_has_almost_no_padding(length):
    rng = random.Random(1)
    sizes = [MIXES["mixed"](rng) for _ in range(20_000)]
    rows = sum(1 for _ in pack(numbered(sizes), length))
    assert padding(sizes, length, rows) < 0.005

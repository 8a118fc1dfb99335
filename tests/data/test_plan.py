"""The order of training: right shares, every row once, the same from anywhere, in constant time."""

import pickle
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from naive_order import Order, Weighting

from bitray.data.permutation import WINDOW, key_of, permute, place
from bitray.data.plan import BLOCK, PERIOD, WHOLE, Entry, MixturePlan, SourceSize, _Quotas, opening
from bitray.data.weights import apportion
from bitray.settings import UserError

SIZES = {
    "code": SourceSize(3000, 3000 * 480),
    "prose": SourceSize(700, 700 * 512),
    "sums": SourceSize(90_000, 90_000 * 300),
}
WEIGHTS = {"code": 0.5, "prose": 0.3, "sums": 0.2}
GOLDEN = ([2, 2, 0, 0, 0, 2], [16370, 24591, 2477, 801, 1060, 49319])
PER_ROW = np.array([size.tokens / size.rows for size in SIZES.values()])


def plan_of(
    weights: dict[str, float] | None = None, seed: int = 0, max_epochs: int | None = None
) -> MixturePlan:
    return MixturePlan(seed, SIZES, [opening(SIZES, weights or WEIGHTS)], max_epochs)


def token_shares(counts: np.ndarray) -> np.ndarray:
    tokens = counts * PER_ROW
    return tokens / tokens.sum()


def test_token_shares_follow_the_weights() -> None:
    rows = plan_of().rows(0, 20_000)
    found = token_shares(np.bincount(rows.source, minlength=3))
    np.testing.assert_allclose(found, [0.5, 0.3, 0.2], atol=0.001)  # the bar is 1 %


def test_every_block_is_within_a_row_of_its_share() -> None:
    plan = plan_of()
    share = np.array(plan.journal[0].weights) / PER_ROW  # the weights in 1/4096
    share /= share.sum()
    for blocks in (1, 2, 7, 1000):
        given_ = np.array(plan.cursors(blocks * BLOCK))
        assert np.abs(given_ - blocks * BLOCK * share).max() < 1.01


def test_each_epoch_of_a_source_has_every_row_once() -> None:
    rows = plan_of().rows(0, 12_000)
    for number, size in enumerate(SIZES.values()):
        mine = rows.source == number
        whole = np.bincount(rows.epoch[mine])[:-1]
        assert (whole == size.rows).all()
        for epoch in range(rows.epoch[mine].max() + 1):
            drawn = rows.row[mine & (rows.epoch == epoch)]
            assert len(set(drawn.tolist())) == len(drawn)
    assert rows.epoch[rows.source == 1].max() >= 3  # it did come to repeats


def test_epochs_and_seeds_differ_in_order() -> None:
    rows = plan_of().rows(0, 12_000)
    prose = rows.row[rows.source == 1]
    assert (prose[:700] != prose[700:1400]).mean() > 0.9
    assert (plan_of(seed=1).rows(0, 500).row != rows.row[:500]).mean() > 0.9


def test_the_same_again_whatever_the_pieces() -> None:
    whole = plan_of().rows(0, 3000)
    for size in (7, 64, 1500):
        plan = plan_of()
        pieces = [plan.rows(at, min(size, 3000 - at)) for at in range(0, 3000, size)]
        for part in ("source", "epoch", "row"):
            joined = np.concatenate([getattr(piece, part) for piece in pieces])
            assert (joined == getattr(whole, part)).all()


def test_an_order_written_down_does_not_change_between_machines_and_versions() -> None:
    rows = plan_of().rows(123_456, 6)
    assert rows.source.tolist() == GOLDEN[0]
    assert rows.row.tolist() == GOLDEN[1]


def test_places_are_found_without_replay() -> None:
    far = 10**10  # replay would be 10^7 blocks, and never end
    plan = plan_of()
    at_once = plan.rows(far, 64)
    assert (np.array(plan.cursors(far)) > 10**8).all()
    assert len(at_once.row) == 64
    # What is found at once is what a walk finds.
    near = plan_of().rows(3 * BLOCK + 17, 200)
    walked = plan_of().rows(0, 3 * BLOCK + 217)
    assert (near.row == walked.row[-200:]).all()


def test_cursors_count_what_was_given() -> None:
    plan = plan_of()
    for row in (0, 1, 1023, 1024, 4321):
        counted = np.bincount(plan.rows(0, row).source, minlength=3) if row else np.zeros(3)
        assert plan.cursors(row) == tuple(counted.astype(int))


# ------------------------------------------------------------------------------------- decisions


def decided(plan: MixturePlan, *decisions: tuple[int, int, dict[str, float] | None]) -> MixturePlan:
    for step, row, weights in decisions:
        plan = plan.extended(plan.decide(step, row, weights))
    return plan


def test_a_new_weighting_leaves_what_was_before_and_holds_after() -> None:
    before = plan_of()
    after = decided(before, (10, 1500, {"code": 0.1, "prose": 0.0, "sums": 0.9}))
    old, new = before.rows(0, 4000), after.rows(0, 4000)
    assert (old.row[:1500] == new.row[:1500]).all()
    rest = new.source[1500:]
    assert (rest != 1).all()  # weight 0: nothing at all
    assert abs(token_shares(np.bincount(rest, minlength=3))[0] - 0.1) < 0.01
    assert after.journal[-1].cursors == before.cursors(1500)


def test_no_change_is_recorded_and_moves_nothing() -> None:
    plan = decided(plan_of(), (10, 1500, None), (20, 2777, None))
    assert [entry.version for entry in plan.journal] == [0, 0, 0]
    assert (plan.rows(0, 5000).row == plan_of().rows(0, 5000).row).all()


def test_a_resumed_journal_is_the_journal() -> None:
    plan = decided(
        plan_of(), (1, 700, {"code": 1.0, "sums": 1.0}), (2, 1900, None), (3, 2000, WEIGHTS)
    )
    again = [Entry.from_json(entry.to_json()) for entry in plan.journal]
    assert tuple(again) == plan.journal
    copy = pickle.loads(pickle.dumps(MixturePlan(0, SIZES, again)))
    assert (copy.rows(1500, 3000).row == plan.rows(1500, 3000).row).all()


def test_what_a_cut_off_block_owes_is_paid_by_the_next() -> None:
    """Weights changed every few rows: the shares are those of one long run, not a random walk."""
    plan = plan_of()
    for step in range(40):
        plan = plan.extended(plan.decide(step, 137 * (step + 1), WEIGHTS))
    counts = np.array(plan.cursors(137 * 40))
    share = np.array(list(WEIGHTS.values())) / PER_ROW
    owed = np.array(plan.decide(99, 137 * 40, WEIGHTS).remainders) / WHOLE
    np.testing.assert_allclose(counts + owed, 137 * 40 * share / share.sum(), atol=3)
    assert np.abs(owed).max() < 25  # one block's shuffle, not forty


def walked(plan: MixturePlan, total: int) -> list[int]:
    """Sources by the naive walk, under the first entry of every weighting."""
    first = {entry.version: entry for entry in reversed(plan.journal)}
    weightings = [Weighting(e.first_row, e.weights) for _, e in sorted(first.items())]
    sizes = {name: tuple(size) for name, size in plan.sizes.items()}
    order = Order(plan.seed, sizes, weightings, plan.journal[0].cursors, plan.max_epochs)
    return [source for source, _ in order.until(total)]


@settings(max_examples=30, deadline=None)
@example([(0, [1, 0, 1]), (2, [0, 0, 1]), (0, [1, 0, 1])], None)  # one draws nothing
@given(
    st.lists(
        st.tuples(
            st.integers(0, 900),
            st.none() | st.lists(st.integers(0, 5), min_size=3, max_size=3).filter(any),
        ),
        max_size=6,
    ),
    st.none() | st.integers(1, 3),
)
def test_under_any_decisions_rows_come_once_per_epoch_and_in_place(
    decisions: list[tuple[int, list[int] | None]], max_epochs: int | None
) -> None:
    sizes = {
        "a": SourceSize(50, 50 * 9),
        "b": SourceSize(333, 333 * 7),
        "c": SourceSize(1500, 9000),
    }
    plan = MixturePlan(3, sizes, [opening(sizes, {"a": 1.0, "b": 2.0, "c": 3.0})], max_epochs)
    row = 0
    for step, (gap, weights) in enumerate(decisions):
        row += gap
        if plan.end is not None and row >= plan.end:
            break
        wanted = None if weights is None else dict(zip("abc", map(float, weights), strict=True))
        grown = plan.extended(plan.decide(step, row, wanted))
        if row:
            assert (plan.rows(0, row).row == grown.rows(0, row).row).all()
        plan = grown
    total = 5000 if plan.end is None else plan.end
    if total == 0:
        return
    rows = plan.rows(0, total)
    assert rows.source.tolist() == walked(plan, total)
    drawn = Counter(zip(rows.source.tolist(), rows.epoch.tolist(), rows.row.tolist(), strict=True))
    assert max(drawn.values()) == 1
    for number, size in enumerate(sizes.values()):
        epochs = np.bincount(rows.epoch[rows.source == number])
        assert (epochs[:-1] == size.rows).all()  # an epoch ends before the next begins
        assert max_epochs is None or len(epochs) <= max_epochs


# ------------------------------------------------------------------------------------ exhaustion


def test_sources_that_stop_leave_their_weight_to_the_others() -> None:
    plan = plan_of(max_epochs=1)
    assert plan.end == sum(size.rows for size in SIZES.values())
    rows = plan.rows(0, plan.end)
    assert np.bincount(rows.source).tolist() == [size.rows for size in SIZES.values()]
    prose_ends = int(np.flatnonzero(rows.source == 1)[-1])
    then = rows.source[prose_ends + 1 : prose_ends + 1 + 2048]
    shares = token_shares(np.bincount(then, minlength=3))
    np.testing.assert_allclose(shares, [5 / 7, 0, 2 / 7], atol=0.01)
    with pytest.raises(IndexError, match="end after 93700 rows"):
        plan.rows(plan.end, 1)


def test_epochs_are_capped() -> None:
    plan = plan_of({"prose": 1.0}, max_epochs=3)
    assert plan.end == 2100
    assert np.bincount(plan.rows(0, 2100).epoch).tolist() == [700, 700, 700]


def test_cursors_continue_from_the_stage_before() -> None:
    first = plan_of()
    ends = dict(zip(SIZES, first.cursors(2000), strict=True))
    second = MixturePlan(0, SIZES, [opening(SIZES, {"sums": 1.0}, ends)])
    seen = first.rows(0, 2000)
    rows = second.rows(0, 3000)
    assert not set(rows.row.tolist()) & set(seen.row[seen.source == 2].tolist())


def test_a_source_without_rows_may_not_have_weight() -> None:
    sizes = {**SIZES, "none": SourceSize(0, 0)}
    MixturePlan(0, sizes, [opening(sizes, WEIGHTS)]).rows(0, 100)
    with pytest.raises(UserError, match=r"weights\.none: this source has no rows"):
        MixturePlan(0, sizes, [opening(sizes, {"none": 1.0})])


def test_what_is_prepared_by_now_moves_no_row_share() -> None:
    """Token shares are those of the rows that the ratio is taken from, and a source that is still
    being prepared has no end that a plan could know of."""
    early = {**SIZES, "prose": SourceSize(300, 100 * 512, 100, done=False)}
    late = {**SIZES, "prose": SourceSize(700, 100 * 512, 100)}
    begun, whole = (MixturePlan(0, sizes, [opening(sizes, WEIGHTS)], 2) for sizes in (early, late))
    known = int(np.flatnonzero(whole.rows(0, 5000).source == 1)[300])
    assert (begun.rows(0, known).source == whole.rows(0, known).source).all()
    assert begun.covers(known) and not begun.covers(known + 1) and whole.covers(known + 1)
    assert begun.end is None and whole.end == 2 * (3000 + 700 + 90_000)


def test_a_limit_for_some_sources() -> None:
    plan = MixturePlan(0, SIZES, [opening(SIZES, WEIGHTS)], {"prose": 1})
    rows = plan.rows(0, 12_000)
    assert plan.end is None and np.bincount(rows.source)[1] == 700
    assert rows.epoch[rows.source == 0].max() >= 1


# ---------------------------------------------------------------------------------------- pieces


@given(st.lists(st.integers(1, 10**6), min_size=1, max_size=40))
@settings(max_examples=20, deadline=None)
def test_quotas_never_miss_by_a_row_and_never_take_one_back(parts: list[int]) -> None:
    """Shares far below one row a block included, where largest remainders go wrong."""
    shares = apportion([Fraction(part**2) for part in parts], WHOLE)
    quotas = _Quotas(shares)
    given_ = np.array([quotas.until(blocks) for blocks in range(PERIOD + 2)])
    exact = np.arange(PERIOD + 2)[:, None] * np.array(shares) / PERIOD
    assert np.abs(given_ - exact).max() < 1
    assert (np.diff(given_, axis=0) >= 0).all()
    assert (given_.sum(axis=1) == BLOCK * np.arange(PERIOD + 2)).all()


@pytest.mark.parametrize("size", [1, 2, 3, 17, 1000])
def test_permutations_are_permutations(size: int) -> None:
    index = np.tile(np.arange(size), 5)
    key = np.repeat(np.arange(5), size).astype(np.uint64)
    found = permute(index, np.full(5 * size, size), key).reshape(5, size)
    assert (np.sort(found, axis=1) == np.arange(size)).all()


def test_a_permutation_looks_shuffled() -> None:
    found = permute(np.arange(1000), np.full(1000, 1000), np.full(1000, 7, np.uint64))
    assert abs(np.corrcoef(found, np.arange(1000))[0, 1]) < 0.1
    assert np.abs(np.diff(found) == 1).sum() < 10


def test_windows_stay_together_and_later_epochs_move_them() -> None:
    rows = 3 * WINDOW + 1000
    cursor = np.arange(2 * rows)
    key = np.full(2 * rows, key_of(0, "a"))
    epoch, row = place(cursor, np.full(2 * rows, rows), key)
    first, second = row[:rows], row[rows:]
    assert (epoch == np.repeat([0, 1], rows)).all()
    assert (np.sort(first) == np.arange(rows)).all() and (np.sort(second) == np.arange(rows)).all()
    assert (first // WINDOW == np.arange(rows) // WINDOW).all()
    # A window's worth of draws touches one window's worth of places, only elsewhere (mod rows).
    occupied = np.sort(second[:WINDOW])
    gaps = np.diff(np.concatenate([occupied, [occupied[0] + rows]]))
    assert (gaps > 1).sum() == 1

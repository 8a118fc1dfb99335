"""What is known of data while it is prepared: the same whatever is done first, never too much."""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitray.data import DataSettings, Manifest
from bitray.data.job import Job, UnitResult
from bitray.data.manifest import SPLITS, Counts, Shard, Skipped, read_manifest
from bitray.data.mixture import Mixture, StageMixture
from bitray.data.permutation import WINDOW
from bitray.data.preparation import Preparation
from bitray.data.sources import Unit
from bitray.settings import UserError
from bitray.storage import FileInfo

LENGTH = 64
Rows = Mapping[str, Sequence[int]]
"""Training rows of every unit of every source."""


def job_of(folder: Path, rows: Rows, row_bytes: int = 3 * LENGTH) -> Job:
    """A job whose units have so many rows, were they prepared; each is a file."""
    sources = {name: {"path": f"/{name}"} for name in rows}
    inputs = {
        name: [FileInfo(f"/{name}/{k:04d}.txt", n * row_bytes, "x") for k, n in enumerate(counts)]
        for name, counts in rows.items()
    }
    data = DataSettings.model_validate({"sources": sources, "unit_bytes": 1})
    return Job(data, inputs, LENGTH, str(folder), "t", "{}", 0, 300)


def result_of(job: Job, unit: Unit, rows: int) -> UnitResult:
    """What a unit of so many rows says when it is done; its number is in its tokens."""
    number = unit.number
    splits = {
        split: Counts(
            documents=count, tokens=count * (40 + number % 5), rows=count,
            shards=(Shard(name=f"{split}-{number}", rows=count, size=0, sha256=""),),
        )
        for split, count in zip(SPLITS, (rows, 5, 5), strict=True)
    }  # fmt: skip
    return UnitResult(
        job=job.identity, source=unit.source, number=number, input_rows=rows, empty=0,
        filtered=0, cut=False,
        skipped=Skipped(), splits=splits,
    )  # fmt: skip


def known(folder: Path, rows: Rows, order: Sequence[int] = ()) -> Iterator[Manifest]:
    """Everything that may ever be known, units ending in an order of their own."""
    job = job_of(folder, rows)

    def work(job: Job, units: Sequence[Unit]) -> Iterator[UnitResult]:
        later = sorted(units, key=lambda unit: (order or [0])[unit.number % len(order or [0])])
        for unit in later:
            yield result_of(job, unit, rows[unit.source][unit.number])

    preparation = Preparation(job)
    yield preparation.open(work)
    for more in preparation.rest(work):
        if more:
            assert preparation.manifest == read_manifest(job.root_uri)
            assert preparation.manifest is not None
            yield preparation.manifest


def mixture_of(manifest: Manifest, max_epochs: int | None) -> Mixture:
    stage = StageMixture(
        seed=0, manifest="m", sizes=manifest.sizes(), weights={"a": 0.7, "b": 0.3}, length=LENGTH,
        steps=20, rows_per_ticket=1000, tickets_per_step=8, max_epochs=max_epochs,
        phases=((6, {"b": 1.0}), (8, {"a": 0.2, "b": 0.8})),
    )  # fmt: skip
    return Mixture.opened(stage, 1, None)


counts = st.lists(st.integers(5_000, 60_000), min_size=4, max_size=9)


@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.tuples(counts, counts),
    st.tuples(st.permutations(range(9)), st.permutations(range(9))),
    st.none() | st.just(2),
)
def test_no_timing_of_units_moves_a_row(
    tmp_path_factory: pytest.TempPathFactory,
    units: tuple[list[int], list[int]],
    orders: tuple[list[int], list[int]],
    max_epochs: int | None,
) -> None:
    """Units end in any order; at every time, all rows that may be planned are those of the end.
    Ratios and openings are known from the first time on."""
    rows = dict(zip("ab", units, strict=True))
    ends = []
    for order in orders:
        told = list(known(tmp_path_factory.mktemp("job"), rows, order))
        assert told[-1].done
        try:
            whole = mixture_of(told[-1], max_epochs)
        except UserError:
            return  # too few rows for the stage, which is known when all are prepared
        for manifest in told:
            mixture = mixture_of(manifest, max_epochs)
            ready = mixture.covered()
            assert ready >= 4 * 8000, "the opening is enough to begin with"
            assert mixture.ready(ready)
            places = [np.random.default_rng(ready).integers(0, ready - 8, 5), [0, ready - 8]]
            for first in itertools.chain(*places):
                found, wanted = (m.plan.rows(int(first), 8) for m in (mixture, whole))
                assert all((x == y).all() for x, y in zip(found, wanted, strict=True))
            for name, source in manifest.sources.items():
                assert source.opening == told[-1].sources[name].opening
                shards = told[-1].sources[name].splits["train"].shards
                assert source.splits["train"].shards == shards[: len(source.splits["train"].shards)]
        assert whole.covered() == whole.stage.end
        ends.append(whole)
    assert [e.to_json() for e in ends[0].plan.journal] == [
        e.to_json() for e in ends[1].plan.journal
    ]


def test_more_prepared_goes_on_where_less_had_come(tmp_path: Path) -> None:
    """One mixture that grows, as the actor's does, is at the end the one of all rows."""
    told = list(known(tmp_path, {"a": [40_000] * 6, "b": [50_000] * 3}))
    assert len(told) > 2
    mixture, covered = mixture_of(told[0], 1), [0]
    for manifest in told:
        mixture.grow(manifest.sizes())
        covered.append(mixture.covered())
    assert covered == sorted(covered) and covered[1] < covered[-1] == mixture.stage.end
    assert mixture.plan.journal == mixture_of(told[-1], 1).plan.journal


@pytest.mark.parametrize("guess", [1, 4, 20])
def test_what_is_prepared_before_the_first_step_does_not_grow_with_the_corpus(
    tmp_path: Path, guess: int
) -> None:
    """Source `a` of 100 or of 1000 units, beside a small one: as many units before training, few
    of them too many, however far its rows are from the guess at their bytes."""
    done = {}
    for size in (100, 1000):
        job = job_of(tmp_path / str(size), {"a": [30_000] * size, "b": [100]}, guess * LENGTH)
        units: list[Unit] = []

        def work(job: Job, some: Sequence[Unit], units: list[Unit] = units) -> Iterator[UnitResult]:
            for unit in some:
                units.append(unit)
                yield result_of(job, unit, 30_000 if unit.source == "a" else 100)

        manifest = Preparation(job).open(work)
        assert manifest.sources["b"].done and not manifest.sources["a"].done
        assert manifest.sources["a"].opened("train").rows == 90_000, "three units hold a window"
        done[size] = units
    assert [u[:2] for u in done[100]] == [u[:2] for u in done[1000]]
    assert len(done[100]) <= 3 * 4 + 1, "three, four times the guess, and the small source's"


def test_where_it_is_interrupted_it_goes_on(tmp_path: Path) -> None:
    """Only the units that are missing are done; nothing changes of what was known."""
    rows = {"a": [30_000] * 8}
    job = job_of(tmp_path, rows)
    asked: list[list[int]] = []

    def work(job: Job, units: Sequence[Unit]) -> Iterator[UnitResult]:
        asked.append([unit.number for unit in units])
        for unit in units:
            if len(asked) == 2 and unit.number == units[1].number:
                raise UserError("gone")
            result = result_of(job, unit, rows[unit.source][unit.number])
            empty = {split: Counts(rows=c.rows, tokens=c.tokens, documents=c.documents)
                     for split, c in result.splits.items()}  # fmt: skip
            result = result.model_copy(update={"splits": empty})
            path = Path(job.root_uri, unit.source, f"unit-{unit.number:06d}.json")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(result.model_dump_json())
            yield result

    first = Preparation(job)
    manifest = first.open(work)
    with pytest.raises(UserError, match="gone"):
        list(first.rest(work))
    again = Preparation(replace(job))
    assert again.manifest is not None and not again.manifest.done
    assert again.open(work).sources["a"].opening == manifest.sources["a"].opening
    list(again.rest(work))
    assert again.manifest.done and again.manifest.num_rows("a") == 240_000
    assert asked[0] + asked[1][:1] + asked[2] == list(range(8))
    assert 30_000 * len(asked[0]) >= WINDOW


@pytest.mark.parametrize("forwards", [True, False])
def test_bad_rows_stop_it_before_training_whatever_comes_later(
    tmp_path: Path, forwards: bool
) -> None:
    """100 of the first 90,000 rows are more than 0.1 %, if not of all; a window ends within them.
    Where more are allowed, the same preparation goes on."""
    job = job_of(tmp_path, {"a": [30_000] * 8}, row_bytes=30)

    def work(job: Job, units: Sequence[Unit]) -> Iterator[UnitResult]:
        for unit in units if forwards else reversed(units):
            bad = Skipped(count=100 * (unit.number == 1), places=("here",))
            yield result_of(job, unit, 30_000).model_copy(update={"skipped": bad})

    with pytest.raises(UserError, match=r"'a': 100 of 90000 rows .*max_bad_rows=0\.001 .*: here"):
        Preparation(job).open(work)
    assert read_manifest(job.root_uri) is None
    more = replace(job, settings=job.settings.model_copy(update={"max_bad_rows": 0.002}))
    assert more.identity == job.identity
    assert Preparation(more).open(work).sources["a"].skipped.count == 100

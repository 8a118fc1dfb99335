"""Shards give back the rows that were written, in any order, and notice damage."""

import hashlib
from pathlib import Path

import numpy as np
import pytest

from bitray import storage
from bitray.data import Manifest, Row, Shards, held_out
from bitray.data import shards as module
from bitray.data.manifest import Counts, Shard, SourceManifest, read_manifest, write_manifest
from bitray.data.packing import PackedRows
from bitray.data.shards import ShardWriter
from bitray.settings import UserError

LENGTH = 16


def some_rows(count: int, seed: int) -> list[Row]:
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        lengths = rng.integers(1, 6, size=3).tolist()
        ids = np.zeros(LENGTH, np.int32)
        ids[: sum(lengths)] = rng.integers(1, 1 << 20, sum(lengths))
        rows.append(Row(ids, lengths, [n - 1 for n in lengths]))
    return rows


def written(root: str, shards: list[list[Row]]) -> Manifest:
    """A prepared folder of one source `s` whose `train` rows are in the given shards."""
    found = []
    for number, rows in enumerate(shards):
        writer = ShardWriter(LENGTH)
        writer.add(rows)
        data = writer.close()
        name = f"s/train-{number:06d}.arrow"
        storage.write_bytes(storage.join(root, name), data.to_pybytes())
        digest = hashlib.sha256(data).hexdigest()
        found.append(Shard(name=name, rows=len(rows), size=data.size, sha256=digest))
    total = sum(map(len, shards))
    counts = Counts(documents=3 * total, tokens=9 * total, rows=total, shards=tuple(found))
    splits = {"train": counts, "probe": Counts(), "validation": Counts()}
    return Manifest(
        job="x", length=LENGTH, group_rows=module.group_rows(LENGTH), window=64, tokenizer="t",
        vocab_size=9, eos_token_id=0, made_from={}, sources={"s": SourceManifest(splits=splits)},
    )  # fmt: skip


@pytest.fixture
def small_groups(monkeypatch):
    """Row groups of 4 rows, so that a few rows span several."""
    monkeypatch.setattr(module, "GROUP_TOKENS", 4 * LENGTH)


def assert_equal(read: PackedRows, expected: list[Row]) -> None:
    ids, lengths, prompts = read
    assert ids.dtype == np.int32
    assert ids.shape == (len(expected), LENGTH)
    assert all(np.array_equal(a, row.input_ids) for a, row in zip(ids, expected, strict=True))
    assert lengths == [row.lengths for row in expected]
    assert prompts == [row.prompts for row in expected]


@pytest.mark.parametrize("where", ["local", "s3"])
def test_rows_come_back_in_any_order(tmp_path, small_groups, where, request):
    root = str(tmp_path) if where == "local" else f"{request.getfixturevalue('s3')}/prepared"
    rows = some_rows(30, seed=0)
    manifest = written(root, [rows[:10], rows[10:11], rows[11:]])
    cache = tmp_path / "cache"
    group_bytes = 4 * 4 * LENGTH
    shards = Shards(root, manifest, cache_dir=str(cache), cache_bytes=3 * group_bytes)
    assert shards.num_rows("s", "train") == 30
    order = np.random.default_rng(1).permutation(30)
    assert_equal(shards.read("s", "train", order), [rows[k] for k in order])
    assert_equal(shards.read("s", "train", [9, 9, 10, 11]), [rows[k] for k in (9, 9, 10, 11)])
    assert_equal(shards.read("s", "train", []), [])
    if where == "s3":
        kept = [path for path in cache.rglob("*") if path.is_file()]
        assert 0 < len(kept) <= 3, "the cache keeps to its size"


def test_rows_that_do_not_exist_are_refused(tmp_path):
    shards = Shards(str(tmp_path), written(str(tmp_path), [some_rows(3, 0)]))
    for row in (-1, 3):
        with pytest.raises(IndexError, match="3 rows"):
            shards.read("s", "train", [row])
    with pytest.raises(UserError, match="nearest: 's'"):
        shards.num_rows("ss", "train")


def test_the_same_rows_give_the_same_bytes(tmp_path):
    rows = some_rows(5, 0)
    for folder in ("a", "b"):
        written(str(tmp_path / folder), [rows])
    first, second = (Path(tmp_path, f, "s/train-000000.arrow").read_bytes() for f in "ab")
    assert first == second


@pytest.mark.parametrize("harm", ["gone", "cut", "not arrow"])
def test_a_damaged_shard_is_named(tmp_path, harm):
    manifest = written(str(tmp_path), [some_rows(50, 0)])
    path = tmp_path / "s/train-000000.arrow"
    data = path.read_bytes()
    path.unlink()
    if harm != "gone":
        path.write_bytes(data[: len(data) // 2] if harm == "cut" else b"x" * len(data))
    with pytest.raises(UserError, match=r"train-000000\.arrow is missing or damaged"):
        Shards(str(tmp_path), manifest).read("s", "train", [0])


def test_held_out_rows_are_spread_over_each_source(tmp_path):
    rows = some_rows(6, 0)
    shards = Shards(str(tmp_path), written(str(tmp_path), [rows]))
    assert held_out(shards, "validation") == {}
    assert_equal(held_out(shards, "train")["s"], rows)
    assert_equal(held_out(shards, "train", max_rows=3)["s"], rows[::2])


def test_a_shard_of_other_bytes_is_found_out_at_its_first_row(tmp_path):
    shards = Shards(str(tmp_path), written(str(tmp_path), [some_rows(5, 0), some_rows(5, 1)]))
    path = tmp_path / "s/train-000001.arrow"
    data = bytearray(path.read_bytes())
    data[-200] ^= 1
    path.write_bytes(bytes(data))
    shards.read("s", "train", [4])
    with pytest.raises(UserError, match=r"train-000001\.arrow is .*its sha256 is not"):
        shards.read("s", "train", [5])


def test_rows_that_are_prepared_later_are_found(tmp_path):
    """As a reader does that was opened early; what is held out stays what it was."""
    root, rows = str(tmp_path), some_rows(9, 0)
    whole = written(root, [rows[:4], rows[4:]])
    source = whole.sources["s"]
    first = source.splits["train"].shards[:1]
    opening = {"train": Counts(rows=4, tokens=36, documents=12)}
    begun = {**source.splits, "train": opening["train"].model_copy(update={"shards": first})}

    def manifest(splits, done):
        sources = {"s": SourceManifest(splits=splits, opening=opening, done=done)}
        return whole.model_copy(update={"sources": sources})

    write_manifest(root, manifest(begun, False))
    shards = Shards(root, read_manifest(root))
    with pytest.raises(IndexError, match="4 rows"):
        shards.read("s", "train", [4])
    assert_equal(held_out(shards, "train", 2)["s"], rows[:4:2])
    write_manifest(root, manifest(source.splits, True))
    assert_equal(shards.read("s", "train", [8, 0]), [rows[8], rows[0]])
    assert_equal(held_out(Shards(root, read_manifest(root)), "train", 2)["s"], rows[:4:2])

"""Sources read every document once, whatever the format and the units, and name what is wrong."""

import gzip
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from bitray import storage
from bitray.data import formats
from bitray.data.formats import Found
from bitray.data.sources import EmbeddedSource, LocalSource, Source, StreamingSource, Unit
from bitray.settings import UserError

TEXTS = ["one", "zwei\nZeilen", "drei\u2028 \u00e4\u00f6\u00fc", "NUL \0 inside", "x" * 5000, "end"]


def lines(texts: list[str]) -> bytes:
    return "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()


def write(path: Path, texts: list[str]) -> Path:
    data = lines(texts)
    match path.suffix:
        case ".parquet":
            pq.write_table(pa.table({"text": texts}), path, row_group_size=2)
        case ".gz":
            path.write_bytes(gzip.compress(data))
        case ".zst":
            path.write_bytes(zstandard.compress(data))
        case ".jsonl" | ".json":
            path.write_bytes(data)
        case ".txt":
            path.write_bytes("\n---\n".join(texts).encode())
    return path


def read(source: LocalSource, unit_bytes: int = 1 << 26) -> list[Found]:
    units = source.units("s", source.inputs(), unit_bytes)
    return [found for unit in units for part in unit.parts for found in source.read(part)]


def texts(found: list[Found]) -> list[str | None]:
    return [one.text for one in found]


@pytest.mark.parametrize(
    "name", ["a.parquet", "a.jsonl", "a.jsonl.gz", "a.jsonl.zst", "a.txt", "a.json", "a.json.gz"]
)
def test_every_format_yields_the_same_documents(tmp_path, name):
    path = write(tmp_path / name, TEXTS)
    source = LocalSource(path=str(path), document_separator="\n---\n")
    assert texts(read(source)) == TEXTS


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "b.txt").write_bytes("\ufeffwith a byte order mark\n\nand more".encode())
    found = read(LocalSource(path=str(tmp_path)))
    assert texts(found) == ["with a byte order mark\n\nand more"]


def test_separators_across_read_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "_CHUNK", 3)
    path = write(tmp_path / "a.txt", TEXTS)
    assert texts(read(LocalSource(path=str(path), document_separator="\n---\n"))) == TEXTS


def test_a_folder_is_read_whole_and_in_an_order_that_does_not_move_with_it(tmp_path):
    orders = []
    for folder in ("here", "there/deeper"):
        for k in range(12):
            file = tmp_path / folder / f"{k % 3}" / f"{k:02}.jsonl"
            file.parent.mkdir(parents=True, exist_ok=True)
            write(file, [f"document {k}"])
        orders.append(texts(read(LocalSource(path=str(tmp_path / folder)))))
    assert sorted(orders[0]) == sorted(f"document {k}" for k in range(12))
    assert orders[0] == orders[1] != sorted(orders[0])


def test_columns_are_joined(tmp_path):
    rows = [{"q": "Why?", "a": "So."}, {"q": "Why?", "a": None}, {"q": "", "a": ""}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "b.parquet")
    for name in ("a.jsonl", "b.parquet"):
        path = str(tmp_path / name)
        source = LocalSource(path=path, columns=("q", "a"), separator=" | ")
        assert texts(read(source)) == ["Why? | So.", "Why?", ""]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.text(max_size=30), min_size=1, max_size=40), st.integers(1, 200))
def test_big_files_are_cut_without_losing_or_doubling_a_document(documents, unit_bytes):
    documents = [text.encode("utf-8", "ignore").decode() for text in documents]
    with tempfile.TemporaryDirectory() as folder:
        for name in ("a.jsonl", "b.parquet"):
            source = LocalSource(path=str(write(Path(folder) / name, documents)))
            assert texts(read(source, unit_bytes)) == documents


def test_units_are_near_the_wanted_size_and_travel_as_json(tmp_path):
    for k in range(40):
        write(tmp_path / f"{k}.jsonl", ["x" * 90])
    write(tmp_path / "big.jsonl", ["y" * 90] * 100)
    source = LocalSource(path=str(tmp_path))
    units = source.units("s", source.inputs(), 1000)
    assert len({unit.number for unit in units}) == len(units) > 10
    assert max(sum(part.size for part in unit.parts) for unit in units) <= 1000
    assert [Unit.load(unit.dump()) for unit in units] == units


def test_bad_rows_are_named_and_cost_nothing_else(tmp_path):
    bad = [b"{broken", b'{"text": "\xff\xfe"}', b'{"txt": "a"}', b'{"text": 3}', b"[1]",
           b'{"text": "\\ud800"}', b"[" * 100_000]  # fmt: skip
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "good"}\n\n' + b"\n".join(bad) + b'\n{"text": "also good"}')
    found = read(LocalSource(path=str(path)))
    assert [one.text for one in found if one.text is not None] == ["good", "also good"]
    problems = [one.problem for one in found if one.text is None]
    assert [word in p for word, p in zip(
        ["not JSON", "UTF-8", "no column 'text' (nearest: 'txt')", "int, not text", "list", "UTF-8",
         "not JSON"], problems, strict=True)] == [True] * 7  # fmt: skip
    assert found[1].place == f"{path}:3"


def test_bad_text_in_parquet_costs_one_row(tmp_path):
    data = pa.array([b"fine", b"\xff\xff", b"fine too"]).view(pa.utf8())
    pq.write_table(pa.table({"text": data}), tmp_path / "a.parquet")
    found = read(LocalSource(path=str(tmp_path / "a.parquet")))
    assert texts(found) == ["fine", None, "fine too"]
    assert found[1] == Found(f"{tmp_path}/a.parquet row 1", None, "not valid UTF-8")


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
@pytest.mark.parametrize("harm", ["cut", "scrambled"])
def test_a_damaged_file_stops_with_its_name(tmp_path, name, harm):
    path = write(tmp_path / name, [f"{k} {k * k}" for k in range(3000)])
    data = path.read_bytes()
    middle = len(data) // 2
    path.write_bytes(
        data[:middle] if harm == "cut" else data[:middle] + b"\0" * 64 + data[middle + 64 :]
    )
    with pytest.raises(UserError, match=name) as error:
        read(LocalSource(path=str(path)))
    assert "\n" not in str(error.value)


def test_a_missing_path_names_what_is_near(tmp_path):
    write(tmp_path / "books.jsonl", ["a"])
    with pytest.raises(UserError, match=r"nearest: 'books.jsonl'"):
        LocalSource(path=str(tmp_path / "boks.jsonl")).inputs()


def test_a_folder_without_documents_says_what_it_wants(tmp_path):
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(UserError, match=r"\.parquet, \.jsonl.*1 files are of other kinds"):
        LocalSource(path=str(tmp_path)).inputs()


def test_a_missing_parquet_column_is_a_setting_not_a_bad_row(tmp_path):
    path = write(tmp_path / "a.parquet", ["x"])
    with pytest.raises(UserError, match=r"no column 'test' \(nearest: 'text'\)"):
        read(LocalSource(path=str(path), columns=("test",)))


def test_object_storage_reads_like_a_folder(tmp_path, s3):
    for name in ("a.parquet", "b.jsonl.gz", "c.jsonl"):
        write(tmp_path / name, [f"{name} {text}" for text in TEXTS])
    storage.upload(str(tmp_path), f"{s3}/corpus")
    remote = texts(read(LocalSource(path=f"{s3}/corpus"), 400))
    assert remote == texts(read(LocalSource(path=str(tmp_path)), 400))
    assert len(remote) == 3 * len(TEXTS)


def test_the_hub_reads_like_a_folder_at_the_commit_of_the_plan(tmp_path, hub):
    folder = tmp_path / "first"
    folder.mkdir()
    for name in ("a.parquet", "b.jsonl.gz", "c.jsonl"):
        write(folder / name, [f"{name} {text}" for text in TEXTS])
    sha = hub.push("org/corpus", folder)
    source = LocalSource(path="hf://datasets/org/corpus")
    inputs = source.inputs()
    assert {file.uri.split("/")[4] for file in inputs} == {f"corpus@{sha}"}
    (tmp_path / "empty").mkdir()
    hub.push("org/corpus", tmp_path / "empty")
    units = source.units("s", inputs, 400)
    found = [one for unit in units for part in unit.parts for one in source.read(part)]
    assert texts(found) == texts(read(LocalSource(path=str(folder)), 400))
    assert len(found) == 3 * len(TEXTS)


def test_an_unknown_dataset_of_the_hub_is_named(hub):
    for source in (LocalSource(path="hf://datasets/org/no"), StreamingSource(path="org/no")):
        with pytest.raises(UserError, match=r"org/no: the Hub at .* has no such dataset"):
            source.inputs()


# ---------------------------------------------------------------------------- streamed datasets


@pytest.fixture
def dataset(tmp_path) -> Path:
    """A folder laid out like a dataset of the Hub: two configurations, one in two csv files."""
    card = """---
configs:
- config_name: plain
  data_files:
  - {split: train, path: plain/*.csv}
- config_name: other
  data_files:
  - {split: test, path: other.csv}
---
"""
    (tmp_path / "plain").mkdir()
    (tmp_path / "README.md").write_text(card)
    for number in range(2):
        rows = "".join(f"{k},title {k},body {k}\n" for k in range(number, 60, 2))
        (tmp_path / "plain" / f"{number}.csv").write_text("number,title,body\n" + rows)
    (tmp_path / "other.csv").write_text('text\none\n"two\nlines"\n')
    return tmp_path


def test_a_streamed_dataset_is_read_shard_by_shard(dataset):
    source = StreamingSource(
        path=str(dataset), name="plain", columns=("title", "body"), separator=": ",
        filters={"number": {"at_least": 10}},
    )  # fmt: skip
    units = source.units("s", source.inputs(), 1 << 20)
    assert [len(unit.parts) for unit in units] == [1, 1]
    read_ = [[*source.read(part)] for unit in units for part in unit.parts]
    assert [len(found) for found in read_] == [30, 30]
    kept = [one.text for found in read_ for one in found if one.text is not None]
    assert sorted(kept) == sorted(f"title {k}: body {k}" for k in range(10, 60))
    assert read_[0] == [*source.read(Unit.load(units[0].dump()).parts[0])], "again the same"


def test_a_dataset_is_streamed_from_the_hub_at_a_commit(tmp_path, hub):
    """In a process of its own: the library reads the Hub's address when it is imported."""
    commits = []
    for version in ("old", "new"):
        folder = tmp_path / version
        folder.mkdir()
        (folder / "train.csv").write_text(f"text\n{version} one\n{version} two\n")
        commits.append(hub.push("org/csv", folder))
    program = """
import json, sys
from bitray.data.sources import StreamingSource
for revision in (sys.argv[1], None):
    source = StreamingSource(path="org/csv", revision=revision)
    (given,) = source.inputs()
    (unit,) = source.units("s", [given], 1 << 20)
    print(json.dumps([given.identity, *(one.text for one in source.read(unit.parts[0]))]))
"""
    told = subprocess.run(
        [sys.executable, "-c", program, commits[0]],
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert [json.loads(line) for line in told.stdout.splitlines()] == [
        [commits[0], "old one", "old two"],
        [commits[1], "new one", "new two"],
    ]


def test_a_streamed_dataset_is_another_when_its_files_change(dataset):
    source = StreamingSource(path=str(dataset), name="other", split="test")
    before = source.inputs()
    assert texts(read(source)) == ["one", "two\nlines"]
    assert source.inputs() == before
    (dataset / "other.csv").write_text("text\nchanged\n")
    assert source.inputs() != before


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"name": "plian"}, r"has no configuration 'plian' \(nearest: 'plain'\); it has: plain, "),
        ({"name": "other", "split": "tset"}, r"has no split 'tset' \(nearest: 'test'\); it has"),
        ({}, r"cannot be opened as a dataset \(Config name is missing"),
    ],
)
def test_what_a_streamed_dataset_lacks_is_said(dataset, settings, sentence):
    with pytest.raises(UserError, match=sentence) as error:
        StreamingSource(path=str(dataset), **settings).inputs()
    assert "\n" not in str(error.value)


def test_a_streamed_dataset_that_is_damaged_is_named(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\n' * 3)
    source = StreamingSource(path=str(tmp_path))
    assert texts(read(source)) == ["one"] * 3
    units = source.units("s", source.inputs(), 1 << 20)
    (tmp_path / "train.jsonl").write_text('{"text": "one"}\nnot json\n')
    with pytest.raises(UserError, match=r"shard 0: cannot be read \(") as error:
        list(source.read(units[0].parts[0]))
    assert str(error.value).startswith(f"{tmp_path} shard 0: cannot be read (")
    assert "\n" not in str(error.value)


def test_files_need_no_type_and_unknown_types_are_refused():
    parse = TypeAdapter(Source).validate_python
    assert parse({"path": "/x", "columns": "body"}) == LocalSource(path="/x", columns=("body",))
    assert parse({"type": "embedded", "domain": "code"}) == EmbeddedSource(domain="code")
    with pytest.raises(ValueError, match="'locl' found using"):
        parse({"type": "locl", "path": "/x"})

"""The Hub is read at a commit, by range, and says in one sentence what it lacks."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hub_server import Hub

from bitray import storage
from bitray.settings import UserError

TEXTS = [f"document {k} " * (k % 7) for k in range(200)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A dataset's folder: two parquet files in one folder, one in another, and a card."""
    for number, name in enumerate(("data/a/0.parquet", "data/a/1.parquet", "data/b/0.parquet")):
        path = tmp_path / "first" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.table({"text": TEXTS[number::3]}), path, row_group_size=16)
    (tmp_path / "first" / "README.md").write_text("card")
    return tmp_path / "first"


def names(files: list[storage.FileInfo]) -> list[str]:
    return [file.uri.split("/", 5)[5] for file in files]


def test_listings_carry_the_commit_and_the_content_of_each_file(hub: Hub, tree: Path) -> None:
    sha = hub.push("org/set", tree)
    files = storage.list_files("hf://datasets/org/set/data")
    assert names(files) == ["data/a/0.parquet", "data/a/1.parquet", "data/b/0.parquet"]
    assert all(file.uri.startswith(f"hf://datasets/org/set@{sha}/") for file in files)
    assert [file.size for file in files] == [
        p.stat().st_size for p in sorted((tree / "data").rglob("*.parquet"))
    ]
    assert len({file.identity for file in files}) == 3
    assert storage.list_files(f"hf://datasets/org/set@{sha}/data") == files
    assert names(storage.list_files("hf://datasets/org/set/data/*/0.parquet")) == [
        "data/a/0.parquet",
        "data/b/0.parquet",
    ]
    assert len(storage.list_files("hf://datasets/org/set")) == 4
    one = storage.list_files("hf://datasets/org/set@main/data/a/1.parquet")
    assert one == files[1:2]


def test_what_was_listed_stays_when_the_branch_moves(hub: Hub, tree: Path, tmp_path: Path) -> None:
    hub.push("org/moving", tree)
    before = storage.list_files("hf://datasets/org/moving/data/a/0.parquet")[0]
    content = (tree / "data/a/0.parquet").read_bytes()
    (tmp_path / "second/data/a").mkdir(parents=True)
    (tmp_path / "second/data/a/0.parquet").write_bytes(b"other")
    hub.push("org/moving", tmp_path / "second")
    after = storage.list_files("hf://datasets/org/moving/data/a/0.parquet")[0]
    assert after.identity != before.identity and after.uri != before.uri
    assert storage.read_bytes(before.uri) == content
    assert storage.read_bytes(after.uri) == b"other"


def test_a_file_is_read_by_range(hub: Hub, tree: Path) -> None:
    (tree / "big.bin").write_bytes(bytes(range(256)) * 200_000)
    hub.push("org/big", tree)
    with storage.open_input("hf://datasets/org/big/big.bin") as file:
        file.seek(40_000_001)
        assert file.read(3) == bytes([1 + 0, 2, 3])


@pytest.mark.parametrize(
    ("path", "sentence"),
    [
        ("datasets/org/sett", r"sett: the Hub at http.* has no such dataset, or it is private"),
        ("datasets/org/set@v9/data", "set@v9: the dataset has no such revision"),
        ("datasets/org/set/dat", r"no such file or folder.* has no 'dat' \(nearest: 'data'\)"),
        ("datasets/org/set/data/*.txt", r"nothing in .*/data matches '\*\.txt'"),
        ("org/set", r"hf://org/set: expected hf://datasets/OWNER/NAME\[@REVISION\]/path"),
    ],
)
def test_what_is_not_there_is_said(hub: Hub, tree: Path, path: str, sentence: str) -> None:
    hub.push("org/set", tree)
    with pytest.raises(UserError, match=sentence) as error:
        storage.list_files(f"hf://{path}")
    assert "\n" not in str(error.value)


def test_a_hub_that_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(
        UserError, match=r"127\.0\.0\.1:9 cannot be reached .*ConnectError"
    ) as error:
        storage.list_files("hf://datasets/org/set")
    assert "\n" not in str(error.value)


def test_a_hub_that_goes_while_a_file_is_read_is_named(
    hub: Hub, tree: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tree / "big.bin").write_bytes(bytes(30 << 20))
    hub.push("org/big", tree)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with storage.open_input("hf://datasets/org/big/big.bin") as file:
        file.read(1)
        hub.close()
        with pytest.raises(UserError, match=r"big\.bin: the Hub .*cannot be reached"):
            while file.read(1 << 20):
                pass


def test_nothing_is_written(hub: Hub, tree: Path) -> None:
    hub.push("org/set", tree)
    for change in (lambda uri: storage.write_bytes(uri, b""), storage.remove):
        with pytest.raises(UserError, match="only read from"):
            change("hf://datasets/org/set/x")

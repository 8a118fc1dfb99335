"""One behaviour of files, whether local or in object storage."""

import gzip
import os
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bitray import storage
from bitray.settings import UserError


@pytest.fixture(params=["local", "s3"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """An empty place, once on disk and once on an S3 server."""
    return str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")


def names(files: list[storage.FileInfo], root: str) -> list[str]:
    return [one.uri.removeprefix(storage.absolute(root)).lstrip("/") for one in files]


# -------------------------------------------------------------------------------- both kinds


def test_what_is_written_is_read(root: str) -> None:
    uri = storage.join(root, "a/b", "c.gz")  # the name says nothing of the bytes
    for data in (b"", b"\0\xff" * 10, b"shorter"):
        storage.write_bytes(uri, data)
        assert storage.read_bytes(uri) == data
        found = storage.info(uri)
        assert found is not None and found.size == len(data)
    storage.write_json(storage.join(root, "j.json"), {"ä": [1.5, None]})
    assert storage.read_json(storage.join(root, "j.json")) == {"ä": [1.5, None]}
    storage.write_text(storage.join(root, "t.txt"), "Grüße\r\n")
    assert storage.read_text(storage.join(root, "t.txt")) == "Grüße\r\n"


def test_listing(root: str) -> None:
    for name in ("x/2.parquet", "x/y/1.jsonl.gz", "x/.metadata", "z.txt"):
        storage.write_bytes(storage.join(root, name), b"12")
    everything = ["x/.metadata", "x/2.parquet", "x/y/1.jsonl.gz", "z.txt"]
    assert names(storage.list_files(root), root) == everything
    assert names(storage.list_files(root, (".parquet", ".jsonl.gz")), root) == everything[1:3]
    assert names(storage.list_files(storage.join(root, "z.txt")), root) == ["z.txt"]
    assert storage.list_dirs(root) == [storage.join(root, "x")]
    assert storage.list_dirs(storage.join(root, "absent")) == []
    assert storage.exists(storage.join(root, "x")) and not storage.exists(storage.join(root, "w"))
    assert storage.info(storage.join(root, "x")) is None, "a folder is no file"


def test_globs(root: str) -> None:
    for name in ("en/a.txt", "en/deep/b.txt", "de/a.txt", "de/a.json", "c.txt"):
        storage.write_bytes(storage.join(root, name), b"")
    for pattern, expected in {
        "*.txt": ["c.txt"],
        "*/a.*": ["de/a.json", "de/a.txt", "en/a.txt"],
        "**/*.txt": ["c.txt", "de/a.txt", "en/a.txt", "en/deep/b.txt"],
        "e?": ["en/a.txt", "en/deep/b.txt"],
        "[de][en]/a.txt": ["de/a.txt", "en/a.txt"],
    }.items():
        assert names(storage.list_files(storage.join(root, pattern)), root) == expected, pattern
    with pytest.raises(UserError, match=r"nothing in .* matches '\*\.parquet'"):
        storage.list_files(storage.join(root, "*.parquet"))


def test_a_missing_path_is_explained_by_its_nearest_sibling(root: str) -> None:
    storage.write_bytes(storage.join(root, "corpora/wiki/train.parquet"), b"")
    for wrong, hint in {
        "corpra/wiki/train.parquet": r"has no 'corpra' \(nearest: 'corpora'\)",
        "corpora/wiki/trian.parquet": r"has no 'trian.parquet' \(nearest: 'train.parquet'\)",
        "corpra/*.parquet": r"has no 'corpra' \(nearest: 'corpora'\)",
        "qqq": r"has no 'qqq'$",
    }.items():
        for read in (storage.list_files, storage.read_bytes):
            with pytest.raises(UserError, match=hint):
                read(storage.join(root, wrong))
    with pytest.raises(UserError, match="is a folder"):
        storage.read_bytes(storage.join(root, "corpora"))


def test_seeking(root: str) -> None:
    uri = storage.join(root, "lines.gz")
    storage.write_bytes(uri, gzip.compress(b"one\ntwo\n" * 9999))
    with storage.open_input(uri) as source:
        assert source.read(2) == b"\x1f\x8b"
        source.seek(0)
        with gzip.open(source) as lines:
            assert sum(1 for _ in lines) == 2 * 9999
        source.seek(-4, os.SEEK_END)
        assert int.from_bytes(source.read(), "little") == 8 * 9999


def test_removal(root: str) -> None:
    for name in ("keep/a", "gone/b/c", "gone/d"):
        storage.write_bytes(storage.join(root, name), b"")
    storage.remove(storage.join(root, "gone"))
    storage.remove(storage.join(root, "gone"))
    assert names(storage.list_files(root), root) == ["keep/a"]
    assert not storage.exists(storage.join(root, "gone"))
    storage.remove(storage.join(root, "keep/a"))
    assert not storage.exists(storage.join(root, "keep/a"))


def test_trees_travel_whole(root: str, tmp_path: Path) -> None:
    content = {f"{n}/part-{n}.bin": bytes([n]) * n * 1000 for n in range(12)} | {".hidden": b"h"}
    for name, data in content.items():
        storage.write_bytes(str(tmp_path / "here" / name), data)
    storage.upload(str(tmp_path / "here"), storage.join(root, "there"))
    storage.download_tree(storage.join(root, "there"), str(tmp_path / "back"))
    back = storage.list_files(str(tmp_path / "back"))
    assert {one: storage.read_bytes(f"{tmp_path}/back/{one}") for one in content} == content
    assert len(back) == len(content)
    storage.upload(str(tmp_path / "here/.hidden"), storage.join(root, "single"))
    assert storage.read_bytes(storage.join(root, "single")) == b"h"


def test_broken_content_is_a_sentence(root: str) -> None:
    uri = storage.join(root, "state.json")
    storage.write_bytes(uri, b'{"a": 1,\n oops}')
    with pytest.raises(UserError, match=r"state\.json, line 2: not JSON"):
        storage.read_json(uri)
    storage.write_bytes(uri, b"ab\xff")
    with pytest.raises(UserError, match=r"not UTF-8 text \(byte 2\)"):
        storage.read_json(uri)


# -------------------------------------------------------------------------------- object storage


def test_fetching_copies_once_per_content(s3: str, tmp_path: Path) -> None:
    uri, cache = storage.join(s3, "shards/x.parquet"), str(tmp_path / "cache")
    storage.write_bytes(uri, b"one")
    local = storage.fetch(uri, cache)
    assert Path(local).read_bytes() == b"one" and local.endswith("x.parquet")
    Path(local).write_bytes(b"from the cache")
    assert Path(storage.fetch(uri, cache)).read_bytes() == b"from the cache"
    storage.write_bytes(uri, b"two, longer")
    assert Path(storage.fetch(uri, cache)).read_bytes() == b"two, longer"
    with pytest.raises(UserError, match=r"nearest: 'x.parquet'"):
        storage.fetch(storage.join(s3, "shards/y.parquet"), cache)
    assert storage.fetch(local, cache) == local, "what is local stays where it is"


def test_an_object_of_many_parts(s3: str) -> None:
    data = os.urandom(1 << 20) * 21
    storage.write_bytes(storage.join(s3, "big.bin"), data)
    assert storage.read_bytes(storage.join(s3, "big.bin")) == data


def test_a_bucket_that_is_not_there(s3: str) -> None:
    with pytest.raises(UserError, match="there is no bucket 'no-such-bucket'"):
        storage.list_files("s3://no-such-bucket/x")
    with pytest.raises(OSError):
        storage.write_bytes("s3://no-such-bucket/x", b"")


def test_a_whole_bucket_is_never_removed(s3: str) -> None:
    storage.write_bytes(storage.join(s3, "a"), b"")
    for uri in (s3, f"{s3}/", "/", "/usr", "file:///"):
        with pytest.raises(UserError, match="refusing"):
            storage.remove(uri)
    assert storage.exists(storage.join(s3, "a"))


# -------------------------------------------------------------------------------- local files


class Interrupted(BaseException):
    """As SIGINT in the middle of a write."""


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_a_write_is_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    uri = str(tmp_path / "state.json")
    storage.write_bytes(uri, b"old")

    def interrupt(*_: object) -> None:
        raise Interrupted

    with monkeypatch.context() as patch:
        patch.setattr(os, at, interrupt)
        with pytest.raises(Interrupted):
            storage.write_bytes(uri, b"new, and longer")
    assert storage.read_bytes(uri) == b"old"
    assert os.listdir(tmp_path) == ["state.json"], "no litter"


def test_data_is_durable_before_its_name_and_its_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []
    fsync, replace = os.fsync, os.replace

    def seen_fsync(descriptor: int) -> None:
        calls.append("folder" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file")
        fsync(descriptor)

    def seen_replace(source: str, target: str) -> None:
        calls.append("rename")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", seen_fsync)
    monkeypatch.setattr(os, "replace", seen_replace)
    storage.write_bytes(str(tmp_path / "x"), b"data")
    assert calls == ["file", "rename", "folder"]


def test_what_a_killed_write_left_is_not_listed(tmp_path: Path) -> None:
    child = os.fork()
    if child == 0:
        os.replace = lambda *_: os._exit(9)  # type: ignore[assignment]
        storage.write_bytes(str(tmp_path / "x"), b"data")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    assert len(os.listdir(tmp_path)) == 1, "the temporary file is there"
    assert storage.list_files(str(tmp_path)) == []
    storage.remove(str(tmp_path))
    assert not tmp_path.exists()


def test_a_reader_never_sees_half_a_file(tmp_path: Path) -> None:
    uri, sizes = str(tmp_path / "x"), (1 << 20, 1)
    storage.write_bytes(uri, bytes(sizes[0]))
    writer = threading.Thread(
        target=lambda: [storage.write_bytes(uri, bytes(sizes[n % 2])) for n in range(40)]
    )
    writer.start()
    while writer.is_alive():
        assert len(storage.read_bytes(uri)) in sizes
    writer.join()


def test_a_new_file_has_the_usual_permissions(tmp_path: Path) -> None:
    """Others on a shared disk read it too; temporary files of `tempfile` would be private."""
    before = os.umask(0o022)
    try:
        storage.write_bytes(str(tmp_path / "x"), b"")
    finally:
        os.umask(before)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o644


def test_removing_a_link_leaves_what_it_points_to(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "data/x"), b"")
    (tmp_path / "link").symlink_to(tmp_path / "data")
    storage.remove(str(tmp_path / "link"))
    assert (tmp_path / "data/x").exists() and not (tmp_path / "link").exists()


def test_local_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers have another working directory than the driver."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    storage.write_bytes("a/b", b"1")
    assert [one.uri for one in storage.list_files("a")] == [str(tmp_path / "a/b")]
    assert storage.local_path("~/x") == str(tmp_path / "home/x")
    assert storage.read_bytes(f"file://{tmp_path}/a/b") == b"1"
    assert not storage.is_remote("a") and storage.is_remote("gs://bucket/x")


def test_a_name_with_wildcards_can_be_meant_as_it_stands(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "data[1].txt"), b"")
    assert len(storage.list_files(str(tmp_path / "data[1].txt"))) == 1


def test_unknown_storage(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'s4' is no kind of storage \(nearest: 's3'\)"):
        storage.read_bytes("s4://bucket/x")
    with pytest.raises(UserError, match="names no bucket"):
        storage.list_files("s3://")


SEGMENT = st.text("ab.", min_size=1, max_size=3).filter(lambda s: s.strip(".") == s)
PATTERN = st.one_of(st.sampled_from(["*", "**", "a*", "*b", "?"]), SEGMENT)


@given(
    st.lists(st.lists(SEGMENT, min_size=1, max_size=3), min_size=1, max_size=5),
    st.lists(PATTERN, min_size=1, max_size=3),
)
def test_globs_match_as_pathlib_does(paths: list[list[str]], pattern: list[str]) -> None:
    """Against the standard library on real files; we add what lies in a folder that matches."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for path in paths:
            target = Path(folder, *path)
            if not target.exists() and not any(one.is_file() for one in target.parents):
                target.parent.mkdir(parents=True, exist_ok=True)
                target.touch()
        matched = [one for one in Path(folder).glob("/".join(pattern)) if str(one) != folder]
        below = {p for one in matched for p in (one, *one.rglob("*")) if p.is_file()}
        if pattern[-1] == "**":  # for pathlib only folders, for us and for shells files as well
            below |= {p for p in Path(folder).glob("/".join([*pattern, "*"])) if p.is_file()}
        uri = f"{folder}/{'/'.join(pattern)}"
        try:
            found = {Path(one.uri) for one in storage.list_files(uri)}
        except UserError:
            found = set()
        assert found == below

"""Temporary folders: gone after their use, and after a process that had no time to remove them."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from bitray.scratch import Scratch, scratch_root

HOLDS = "from bitray.scratch import Scratch; held = Scratch(); print(held.path, flush=True); "


@pytest.fixture(autouse=True)
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where folders of this test, and of processes that it starts, lie."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return scratch_root()


@pytest.fixture
def holder() -> Iterator[subprocess.Popen[str]]:
    """Another process that has a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS + "input()"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    yield process
    process.kill()
    process.communicate()


def folders(root: Path) -> list[Path]:
    return [path for path in root.iterdir() if path.is_dir()]


def test_a_folder_goes_with_its_block_with_an_error_and_with_the_object(root: Path) -> None:
    with Scratch() as path:
        Path(path, "a").write_text("a")
        assert len(folders(root)) == 1
    with pytest.raises(RuntimeError), Scratch():
        raise RuntimeError
    held = Scratch()
    assert os.listdir(held.path) == []
    del held
    assert folders(root) == []


def test_a_process_that_ends_without_a_word_takes_its_folder_along(root: Path) -> None:
    said = subprocess.run([sys.executable, "-c", HOLDS], capture_output=True, text=True, check=True)
    assert said.stdout.startswith(str(root)) and folders(root) == []


def test_what_a_killed_process_left_goes_and_what_another_uses_stays(
    root: Path, holder: subprocess.Popen[str]
) -> None:
    assert holder.stdout is not None
    theirs = Path(holder.stdout.readline().strip())
    (theirs / "large").write_text("large")
    with Scratch() as mine:
        assert theirs.exists() and Path(mine).exists()
    assert (theirs / "large").exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert theirs.exists(), "nobody could remove it"
    with Scratch() as mine:
        assert not theirs.exists() and os.listdir(mine) == []
    assert folders(root) == []


def test_what_was_cut_short_while_it_was_removed_goes(root: Path) -> None:
    Scratch().close()
    (root / "half" / "files").mkdir(parents=True)
    with Scratch():
        assert len(folders(root)) == 1

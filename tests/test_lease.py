"""One writer per run: who is refused, who takes over, and who may write no more."""

import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bitray import lease, storage
from bitray.lease import Claim, TakenOver, acquire, held
from bitray.settings import UserError


@pytest.fixture(params=["local", "s3"])
def run_dir(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A run that nobody holds so far, on disk and in object storage."""
    root = str(tmp_path) if request.param == "local" else request.getfixturevalue("s3")
    return storage.join(root, "run")


def elsewhere(claim: Claim) -> None:
    """Make the holder a process of another machine, whose life cannot be looked up."""
    values = storage.read_json(claim.uri)
    storage.write_json(claim.uri, {**values, "host": "node-7", "machine": "another"})


def test_a_second_driver_is_refused_naming_the_first(run_dir: str) -> None:
    with held(run_dir) as first:
        began = time.monotonic()
        said = rf"process {os.getpid()} on .*, whose last heartbeat is [0-9] s old"
        with pytest.raises(UserError, match=said):
            acquire(run_dir)
        assert time.monotonic() - began < 5
        first.check()
    again = acquire(run_dir)  # what ended in good order is free at once
    assert (first.epoch, again.epoch) == (1, 2)


def test_a_stale_lease_is_taken_over_and_the_late_first_writer_refused(run_dir: str) -> None:
    first = acquire(run_dir)
    first.beat()
    elsewhere(first)
    soon, late = time.time() + lease.STALE_S - 5, time.time() + lease.STALE_S + 5
    with pytest.raises(UserError, match=r"on node-7, whose last heartbeat is 2\d s old"):
        acquire(run_dir, now=lambda: soon)
    second = acquire(run_dir, now=lambda: late)
    assert second.epoch == first.epoch + 1
    first.beat()  # it comes back, and knows nothing
    with pytest.raises(TakenOver, match=r"taken over by process \d+ on .*, epoch 2"):
        first.check()
    second.check()


def test_a_driver_that_was_killed_on_this_machine_holds_nothing(tmp_path: Path) -> None:
    """The same command goes on at once, not after the heartbeat has grown old."""
    code = (
        "import os, sys; from bitray import lease; lease.acquire(sys.argv[1]).beat(); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert acquire(str(tmp_path)).epoch == 2


def test_another_process_of_the_same_number_is_not_the_holder(tmp_path: Path) -> None:
    first = acquire(str(tmp_path))
    values = storage.read_json(first.uri)
    storage.write_json(first.uri, {**values, "began": "1"})  # the number was given anew since
    assert acquire(str(tmp_path)).epoch == 2


def test_of_many_that_begin_at_once_one_holds_it(tmp_path: Path) -> None:
    found: list[Claim] = []
    refused: list[str] = []
    gate = threading.Barrier(8)

    def begin() -> None:
        gate.wait()
        try:
            found.append(acquire(str(tmp_path)))
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert len(found) == 1 and len(refused) == 7
    found[0].check()


def test_two_that_wrote_the_same_remote_epoch_know_who_has_it(s3: str) -> None:
    """Without conditional writes the last writer stays; the other one finds out."""
    run_dir = storage.join(s3, "run")
    first = acquire(run_dir)
    storage.write_bytes(first.uri, json.dumps({"holder": "x", "pid": 1, "host": "h"}).encode())
    with pytest.raises(TakenOver, match="process 1 on h, epoch 1"):
        first.check()


def test_a_deleted_run_is_nobodys(tmp_path: Path) -> None:
    first = acquire(str(tmp_path / "run"))
    storage.remove(str(tmp_path / "run"))
    with pytest.raises(TakenOver, match="deleted"):
        first.check()


def test_the_heart_beats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease, "BEAT_S", 0.01)
    beat, released = (tmp_path / "lease" / f"000001.{kind}" for kind in ("beat", "released"))
    with held(str(tmp_path)):
        first = json.loads(beat.read_text())["time"]
        end = time.monotonic() + 30
        while json.loads(beat.read_text())["time"] == first:
            assert time.monotonic() < end
            time.sleep(0.01)
        assert not released.exists()
    assert released.exists()


def test_create_makes_a_file_once(run_dir: str) -> None:
    uri = storage.join(run_dir, "x")
    assert storage.create(uri, b"mine")
    assert not storage.create(uri, b"yours")
    assert storage.read_bytes(uri) == b"mine"


def test_a_heartbeat_on_its_way_does_not_undo_the_release(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same process may go on at once, as it does after a stop."""
    plain, begun = Claim.beat, threading.Event()

    def slow(claim: Claim) -> None:
        begun.set()
        time.sleep(0.1)
        plain(claim)

    monkeypatch.setattr(lease, "BEAT_S", 0.2)
    with held(str(tmp_path)):
        monkeypatch.setattr(Claim, "beat", slow)
        assert begun.wait(10)
    time.sleep(0.3)
    monkeypatch.setattr(Claim, "beat", plain)
    assert acquire(str(tmp_path)).epoch == 2

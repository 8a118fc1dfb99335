"""Patience with object storage, against a real S3 server behind a proxy that fails as told."""

import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from flaky_s3 import FlakyS3

from bitray import checkpoint, retries, storage
from bitray.retries import StorageGone, failing, patient, retried
from bitray.settings import UserError


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*trying again", UserWarning)
        yield


def test_what_passes_is_tried_again_until_it_works(monkeypatch: pytest.MonkeyPatch) -> None:
    calls, seen = [], []

    def call() -> str:
        calls.append(1)
        seen.append(failing())
        if len(calls) < 4:
            raise OSError("AWS Error NETWORK_CONNECTION during PutObject operation: curlCode: 7")
        return "done"

    assert retried("s3://b/x", call) == "done"
    assert len(calls) == 4 and seen[0] is None and "curlCode: 7" in (seen[3] or "")
    assert failing() is None


@pytest.mark.parametrize(
    ("error", "raised", "said"),
    [
        (OSError("AWS Error ACCESS_DENIED during PutObject operation"), UserError, "is denied"),
        (OSError("AWS Error UNKNOWN (HTTP status 403) during Head"), UserError, "is denied"),
        (OSError("AWS Error EXPIRED_TOKEN: The token has expired"), UserError, "renew the cred"),
        (OSError("AWS Error NO_SUCH_BUCKET during ListObjectsV2"), OSError, "NO_SUCH_BUCKET"),
        (FileNotFoundError("no such key"), FileNotFoundError, "no such key"),
        (OSError(28, "No space left on device"), OSError, "No space"),
        (ValueError("a mistake of ours"), ValueError, "ours"),
    ],
)
def test_what_does_not_pass_is_told_at_once(error: Exception, raised: type, said: str) -> None:
    calls = []

    def call() -> None:
        calls.append(1)
        raise error

    with pytest.raises(raised, match=said):
        retried("s3://b/x", call)
    assert len(calls) == 1


def test_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    def call() -> None:
        raise OSError("AWS Error SLOW_DOWN during GetObject operation")

    began = time.monotonic()
    with patient(1.0), pytest.raises(StorageGone, match=r"s3://b/x: .* answered for 1 s .*SLOW_"):
        retried("s3://b/x", call)
    assert 1.0 <= time.monotonic() - began < 3
    assert failing() is None and retries._patience == 600


@pytest.mark.timeout(300)
def test_thirty_percent_of_errors_change_nothing(proxy: FlakyS3, s3: str, tmp_path: Path) -> None:
    proxy.rate = 0.3
    uri, data = storage.join(s3, "a/b.bin"), bytes(range(256)) * 40_000
    storage.write_bytes(uri, data)
    assert storage.read_bytes(uri) == data
    for number in range(12):
        storage.write_json(storage.join(s3, f"a/{number}.json"), number)
    assert len(storage.list_files(storage.join(s3, "a"))) == 13
    assert storage.list_dirs(s3) == [storage.join(s3, "a")]
    storage.download_tree(storage.join(s3, "a"), str(tmp_path / "a"))
    assert (tmp_path / "a/b.bin").read_bytes() == data
    storage.remove(storage.join(s3, "a"))
    assert not storage.exists(storage.join(s3, "a"))
    assert proxy.failed > 5, "nothing was disturbed"


def test_a_server_that_is_gone_is_a_sentence_and_comes_back(proxy: FlakyS3, s3: str) -> None:
    storage.write_bytes(storage.join(s3, "x"), b"1")
    proxy.rate = 1.0
    with patient(1.0), pytest.raises(StorageGone, match="has not answered for"):
        storage.write_bytes(storage.join(s3, "x"), b"2")
    proxy.rate = 0.0
    assert storage.read_bytes(storage.join(s3, "x")) == b"1"


def test_denied_access_is_not_tried_again(proxy: FlakyS3, s3: str) -> None:
    proxy.rate, proxy.status = 1.0, 403
    before = proxy.failed
    with pytest.raises(UserError, match=r"access is denied .* renew the credentials"):
        storage.write_bytes(storage.join(s3, "x"), b"2")
    assert proxy.failed - before == 1


def test_training_goes_on_while_a_checkpoint_waits_for_storage(proxy: FlakyS3, s3: str) -> None:
    """Staged here, uploaded when storage answers again; meanwhile no other save can begin."""
    import torch

    root = storage.join(s3, "run")
    saver = checkpoint.Saver()
    tensors = {"model": {"w": torch.arange(5.0)}}
    assert saver.ready()
    saver.save(checkpoint.step_directory(root, 1), tensors, {"step": 1})
    assert saver.ready(), "storage answers, so a save only has to wait"
    proxy.rate = 1.0
    saver.save(checkpoint.step_directory(root, 2), tensors, {"step": 2})
    tensors["model"]["w"].zero_()  # training goes on
    assert not saver.ready()
    proxy.rate = 0.0
    saver.wait()
    found = checkpoint.newest_complete(root)
    assert found == checkpoint.step_directory(root, 2)
    target = {"model": {"w": torch.zeros(5)}}
    checkpoint.load_tensors(found, target)
    assert target["model"]["w"].tolist() == [0, 1, 2, 3, 4]
    proxy.rate = 1.0
    with patient(1.0):
        saver.save(checkpoint.step_directory(root, 3), tensors, {"step": 3})
        with pytest.raises(StorageGone):
            saver.wait()
    saver.close()

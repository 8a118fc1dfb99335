"""A process that ends at any write, and a disk that fails at any: what a run keeps is what it was
before or what it was to become, and the same work, done again, comes to its end.

`test_checkpoint` has the same of checkpoints that training waits for.
"""

import asyncio
import os
import shutil
import signal
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from faults import by_seed, faulty, finished
from flaky_s3 import FlakyS3
from ranks import FORKED

from bitray import Config, checkpoint, lease, storage
from bitray.data.actor import MixtureActor
from bitray.data.mixture import StageMixture
from bitray.data.plan import SourceSize
from bitray.events import Events, read_events
from bitray.lease import Claim
from bitray.pipeline.identity import claim
from bitray.settings import UserError


def tensors(value: float) -> dict[str, Any]:
    return {"model": {"w": torch.full((64,), value), "scale": torch.tensor(value)}}


# ------------------------------------------------------------------------------------------ cases


class Case(NamedTuple):
    """Something that is written in several steps."""

    before: Callable[[Path], Any]
    """What there is already."""
    work: Callable[[Path], Any]
    """What is disturbed."""
    check: Callable[[Path, bool], Any]
    """What has to hold after that; whether the work was done."""


def save(root: Path | str, step: int) -> None:
    """Beside training, with retention, as a worker does."""
    saver = checkpoint.Saver()
    after = lambda: checkpoint.retain(str(root), 1)  # noqa: E731
    directory = checkpoint.step_directory(str(root), step)
    saver.save(directory, tensors(step), {"step": step}, {"model/a": b"a"}, after=after)
    saver.wait()


def check_saved(root: Path | str, done: bool) -> None:
    newest = checkpoint.newest_complete(str(root))
    assert newest is not None, "the old one went before the new one was whole"
    step = checkpoint.load_state(newest)["step"]
    target = tensors(0)
    checkpoint.load_tensors(newest, target)
    assert target["model"]["scale"] == step and target["model"]["w"].eq(step).all()
    assert step == 2 if done else step in (1, 2)


def decide(root: Path | str, steps: int) -> None:
    """The journal of a stage with a decision every 5 steps, as far as it is not decided yet."""
    sizes = {"a": SourceSize(90, 900), "b": SourceSize(400, 3000)}
    stage = StageMixture(
        seed=0, manifest="m", sizes=sizes, weights={"a": 0.25, "b": 0.75}, length=16, steps=50,
        rows_per_ticket=2, tickets_per_step=4, bundle=4, lead=4, period=5,
    )  # fmt: skip

    async def story() -> None:
        actor = MixtureActor(str(root))
        if not storage.exists(storage.join(str(root), "s.json")):
            await actor.open("s", stage)
        for step in range(5, steps + 1, 5):
            await actor.set_weights("s", step, {"a": float(step), "b": 5.0})

    asyncio.run(story())


def check_journal(root: Path | str, done: bool) -> None:
    uri = storage.join(str(root), "s.json")
    journal = storage.read_json(uri)["journal"] if storage.exists(uri) else []
    steps = [entry["step"] for entry in journal]
    assert steps == [-1, 5, 10, 15, 20][: len(steps)], "a decision was lost or taken twice"
    assert not done or len(steps) == 5


def hold(root: Path) -> None:
    with lease.held(str(root)):
        pass


def check_lease(root: Path, done: bool) -> None:
    """Nobody is locked out by a dead process, and no epoch is given twice."""
    last = lease.newest_epoch(str(root))
    again = lease.acquire(str(root))
    assert again.epoch == last + 1
    again.check()
    again.release()


def config(root: Path, *words: str) -> Config:
    return Config.load(overrides=[f"output_dir={root}", "experiment=x", *words])


def identify(root: Path) -> None:
    claim(config(root), {"256": {"a": "a"}})


def check_identity(root: Path, done: bool) -> None:
    """The folder is this run's or nobody's, never half of it."""
    uri = str(root / "x" / "fingerprint.json")
    assert not done or storage.exists(uri)
    if storage.exists(uri):
        (root / "x" / "stage0_checkpoint").mkdir(exist_ok=True)
        with pytest.raises(UserError, match=r"data\.seed: 0 there, 5 now"):
            claim(config(root, "data.seed=5"), {"256": {"a": "a"}})


def tell(root: Path | str) -> None:
    events = Events(Claim(str(root), 1, "me"), "driver")
    for number in range(4):
        events.write("checkpoint", number=number)
    events.close()


def check_events(root: Path | str, done: bool) -> None:
    found: dict[str, list[int]] = {}
    for event in read_events(str(root)):
        found.setdefault(event["file"], []).append(event["number"])
    assert all(numbers == [0, 1, 2, 3][: len(numbers)] for numbers in found.values())
    assert not done or [0, 1, 2, 3] in found.values()


CASES = {
    "checkpoint": Case(lambda root: save(root, 1), lambda root: save(root, 2), check_saved),
    "journal": Case(lambda _: None, lambda root: decide(root, 20), check_journal),
    "lease": Case(hold, hold, check_lease),
    "identity": Case(lambda _: None, identify, check_identity),
    "events": Case(tell, tell, check_events),
}


@pytest.fixture(autouse=True)
def quiet() -> Any:
    """Partial checkpoints are spoken of."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*looking for an earlier", UserWarning)
        yield


@pytest.mark.parametrize("name", CASES)
def test_a_crash_at_any_write_loses_nothing(tmp_path: Path, name: str) -> None:
    case, crash, done = CASES[name], 0, False
    case.before(tmp_path / "before")
    while not done:
        crash += 1
        root = tmp_path / str(crash)
        if (tmp_path / "before").exists():
            shutil.copytree(tmp_path / "before", root)
        done = finished(lambda root=root: case.work(root), crash)
        case.check(root, done)
        case.work(root)
        case.check(root, True)
        shutil.rmtree(root)
    assert crash > 5, "fewer changes than there have to be: nothing was crashed"


# Not the lease: one whose release failed is held by this process, which lives.
@pytest.mark.parametrize("name", [name for name in CASES if name != "lease"])
def test_a_disk_that_fails_now_and_then_loses_nothing(tmp_path: Path, name: str) -> None:
    """Errors, delays and half writes, by seed; what fails is raised, what was there is not hurt."""
    case, failed = CASES[name], 0
    for seed in range(12):
        root = tmp_path / str(seed)
        case.before(root)
        try:
            with faulty(by_seed(seed, 0.07)):
                case.work(root)
            done = True
        except OSError:
            failed, done = failed + 1, False
        case.check(root, done)
        case.work(root)
        case.check(root, True)
    assert failed, "the disk did not fail"


# ------------------------------------------------------------------------------- object storage


def work(name: str, root: str, environment: dict[str, str]) -> None:
    """The server that forks has the environment of the first test that asked for it."""
    os.environ.update(environment)
    CASES[name].work(root)  # type: ignore[arg-type]


def killed(proxy: FlakyS3, name: str, root: str, at: int) -> bool:
    """Whether the work in a process of its own was killed at one of its requests: at an odd number
    before the server has it, else when it is done and nobody was told."""
    child, left = FORKED.Process(target=work, args=(name, root, dict(os.environ))), [at]

    def change(done: bool) -> None:
        left[0] -= 1
        if left[0] == 0:
            child.kill()

    proxy.change = change
    child.start()
    child.join()
    proxy.change = lambda done: None
    assert child.exitcode in (0, -signal.SIGKILL), "the child failed in another way"
    return child.exitcode != 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize(("name", "least"), [("checkpoint", 10), ("journal", 10), ("events", 2)])
def test_a_crash_at_any_request_to_object_storage_loses_nothing(
    name: str, least: int, proxy: FlakyS3, s3: str
) -> None:
    """Events that wait for storage may be written together, in one request."""
    case, crash, dead = CASES[name], 0, True
    while dead:
        crash += 1
        root: Any = f"{s3}/{crash}"
        case.before(root)
        dead = killed(proxy, name, root, crash)
        case.check(root, not dead)
        case.work(root)
        case.check(root, True)
    assert crash > least, "fewer requests than there have to be: nothing was crashed"

"""What a checkpoint promises: whole or not counted, readable on any number of ranks, never code."""

import hashlib
import json
import pickle
import resource
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from faults import finished

from bitray import checkpoint, storage
from bitray.safe_reader import parse_metadata
from bitray.settings import UserError

FILES = {"model/config.json": b'{"hidden_size": 4}'}


def tensors(value: float = 1.0) -> dict[str, Any]:
    return {
        "model": {"layer.weight": torch.full((3, 4), value), "strength": torch.tensor(value)},
        "optimizer": {"state": {"layer.weight": {"step": torch.tensor(7.0) * value}}},
    }


def saved(root: Path | str, step: int = 1, value: float = 1.0) -> str:
    directory = checkpoint.step_directory(str(root), step)
    checkpoint.save(directory, tensors(value), {"step": step}, FILES)
    return directory


def reseal(directory: str) -> None:
    """What someone who can write the files can do: make the marker agree with them."""
    seal = json.loads(Path(directory, "COMPLETE").read_text())
    for name, entry in seal["files"].items():
        content = Path(directory, name).read_bytes()
        entry |= {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    Path(directory, "COMPLETE").write_text(json.dumps(seal))


def flip(path: Path, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    path.write_bytes(content)


# -------------------------------------------------------------------------------- one process


def test_tensors_of_every_kind_come_back_bit_for_bit(tmp_path: Path) -> None:
    kinds = [torch.float32, torch.bfloat16, torch.float16, torch.int8, torch.int64, torch.bool]
    source = {str(kind): torch.randn(5, 3).mul(9).to(kind) for kind in kinds}
    source |= {"scalar": torch.tensor(3.5), "odd": torch.tensor([float("nan"), -0.0])}
    source["transposed"] = torch.randn(4, 6).T
    checkpoint.save(str(tmp_path / "c"), {"t": source}, {})
    target = {key: torch.zeros_like(value) for key, value in source.items()}
    before = dict(target)
    checkpoint.load_tensors(str(tmp_path / "c"), {"t": target})
    for key, value in source.items():
        assert target[key] is before[key], "loading is in place"
        raw = [one.contiguous().reshape(-1).view(torch.uint8) for one in (value, target[key])]
        assert torch.equal(*raw), key


def test_state_and_small_files_come_back(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    assert checkpoint.load_state(directory) == {"step": 1}
    assert checkpoint.read_file(directory, "model/config.json") == FILES["model/config.json"]
    assert checkpoint.file_names(directory, "model/") == ["model/config.json"]
    assert checkpoint.keys(directory)["model.layer.weight"] == (3, 4)
    assert checkpoint.verify(directory) is None
    with pytest.raises(UserError, match=r"no file 'model/confg.json' \(nearest: 'model/config"):
        checkpoint.read_file(directory, "model/confg.json")


def test_the_bytes_of_a_checkpoint_depend_on_its_content_only(tmp_path: Path) -> None:
    """So that two runs can be compared by hash, and no path of a machine travels with a model."""
    one, two = saved(tmp_path / "a"), saved(tmp_path / "b")
    assert Path(one, "COMPLETE").read_bytes() == Path(two, "COMPLETE").read_bytes()
    assert str(tmp_path).encode() not in Path(one, ".metadata").read_bytes()


def test_what_does_not_fit_is_named(tmp_path: Path) -> None:
    directory, scalar = saved(tmp_path), torch.tensor(0.0)
    with pytest.raises(
        UserError, match=r"no tensor 'model.strenght' \(nearest: 'model.strength'\)"
    ):
        checkpoint.load_tensors(directory, {"model": {"strenght": scalar}})
    with pytest.raises(UserError, match=r"'model.strength' has shape \[\], where \[2\] is wanted"):
        checkpoint.load_tensors(directory, {"model": {"strength": torch.zeros(2)}}, strict=False)
    with pytest.raises(UserError, match=r"also holds 'model.layer.weight'"):
        checkpoint.load_tensors(directory, {"model": {"strength": scalar}})
    checkpoint.load_tensors(directory, {"model": {"strength": scalar}}, strict=False)
    assert scalar == 1
    with pytest.raises(UserError, match=r"has no 'step_00001' \(nearest: 'step_000001'\)"):
        checkpoint.load_state(str(tmp_path / "step_00001"))


def test_only_tensors_and_json_are_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"'optimizer.lr' is a float"):
        checkpoint.save(str(tmp_path / "c"), {"optimizer": {"lr": 0.1}}, {})
    with pytest.raises(TypeError, match="not JSON serializable"):
        checkpoint.save(str(tmp_path / "c"), tensors(), {"rng": torch.zeros(2)})
    with pytest.raises(ValueError, match="no file name inside a checkpoint"):
        checkpoint.save(str(tmp_path / "c"), tensors(), {}, {"../outside": b""})


def test_saving_never_wipes_a_folder_of_other_things(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(UserError, match=r"holds 'thesis.tex'"):
        checkpoint.save(str(tmp_path), tensors(), {})
    assert (tmp_path / "thesis.tex").read_text() == "years of work"


def test_saving_again_leaves_nothing_of_an_earlier_try(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    Path(directory, "__7_0.distcp").write_bytes(b"of a larger world")
    saved(tmp_path, value=2.0)
    assert not Path(directory, "__7_0.distcp").exists()
    target = tensors(0.0)
    checkpoint.load_tensors(directory, target)
    assert target["model"]["strength"] == 2


# -------------------------------------------------------------------------------- damage


@pytest.mark.parametrize("name", ["__0_0.distcp", ".metadata", "state.json", "model/config.json"])
@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "lose"])
def test_damage_to_any_file_is_found_and_the_previous_one_used(
    tmp_path: Path, name: str, harm: str
) -> None:
    """DCP itself would load a shard with a flipped bit without a word."""
    previous, newest = saved(tmp_path, 1), saved(tmp_path, 2)
    path = Path(newest, name)
    content = path.read_bytes()
    match harm:
        case "flip":
            flip(path, len(content) * 4)
        case "cut":
            path.write_bytes(content[:-1])
        case "grow":
            path.write_bytes(content + b"\0")
        case "lose":
            path.unlink()
    assert name in (checkpoint.verify(newest) or "")
    with pytest.warns(UserWarning, match=f"{name}.*looking for an earlier checkpoint"):
        assert checkpoint.newest_complete(str(tmp_path)) == previous
    with pytest.raises(UserError, match=name):
        checkpoint.load_tensors(newest, tensors())
        checkpoint.load_state(newest)
        checkpoint.read_file(newest, "model/config.json")


def test_no_flipped_bit_of_the_marker_goes_unnoticed(tmp_path: Path) -> None:
    marker = Path(checkpoint.step_directory(str(tmp_path), 1), "COMPLETE")
    checkpoint.save(str(marker.parent), {"t": {"x": torch.zeros(1)}}, {})
    content = marker.read_bytes()
    meaning = json.loads(content)
    for bit in range(0, len(content) * 8, 11):
        flip(marker, bit)
        if checkpoint.verify(str(marker.parent)) is None:
            assert json.loads(marker.read_bytes()) == meaning, f"bit {bit}"
        marker.write_bytes(content)


def test_an_unfinished_save_does_not_count(tmp_path: Path) -> None:
    previous, newest = saved(tmp_path, 1), saved(tmp_path, 2)
    Path(newest, "COMPLETE").unlink()
    assert "no COMPLETE marker" in (checkpoint.verify(newest) or "")
    assert not checkpoint.is_complete(newest)
    with pytest.warns(UserWarning, match="no COMPLETE marker"):
        assert checkpoint.newest_complete(str(tmp_path)) == previous
    with pytest.raises(UserError, match="its save was not finished"):
        checkpoint.load_state(newest)


def test_another_format_is_refused(tmp_path: Path) -> None:
    marker = Path(saved(tmp_path), "COMPLETE")
    marker.write_text(marker.read_text().replace("checkpoint-1", "checkpoint-9"))
    assert "format" in (checkpoint.verify(str(marker.parent)) or "")


def test_a_marker_cannot_lead_out_of_its_directory(tmp_path: Path) -> None:
    marker = Path(saved(tmp_path), "COMPLETE")
    marker.write_text(marker.read_text().replace("model/config.json", "model/../../secret"))
    with pytest.raises(UserError, match="no file name inside a checkpoint"):
        checkpoint.file_names(str(marker.parent))


# -------------------------------------------------------------------------------- which to keep


def test_the_newest_is_the_highest_step(tmp_path: Path) -> None:
    assert checkpoint.newest_complete(str(tmp_path / "nothing")) is None
    for step in (900, 1_000_000, 20):
        saved(tmp_path, step)
    checkpoint.save(str(tmp_path / "final"), tensors(), {})
    assert checkpoint.newest_complete(str(tmp_path)) == str(tmp_path / "step_1000000")


def test_retention_keeps_the_newest_the_best_and_the_final(tmp_path: Path) -> None:
    steps = [saved(tmp_path, step) for step in (1, 2, 3, 4)]
    for name in ("best", "final"):
        checkpoint.save(str(tmp_path / name), tensors(), {})
    Path(steps[2], "COMPLETE").unlink()
    assert checkpoint.retain(str(tmp_path), keep_last=2) == [steps[2], steps[0]]
    assert {path.name for path in tmp_path.iterdir()} == {
        "step_000002", "step_000004", "best", "final",
    }  # fmt: skip


def test_nothing_is_removed_before_a_newer_one_verifies(tmp_path: Path) -> None:
    steps = [saved(tmp_path, step) for step in (1, 2, 3)]
    flip(Path(steps[2], "__0_0.distcp"), 999)
    flip(Path(steps[1], "__0_0.distcp"), 999)
    with pytest.warns(UserWarning, match="looking for an earlier"):
        assert checkpoint.retain(str(tmp_path), keep_last=1) == []
    assert checkpoint.verify(steps[0]) is None
    flip(Path(steps[0], "__0_0.distcp"), 999)
    with pytest.warns(UserWarning, match="looking for an earlier"):
        assert checkpoint.retain(str(tmp_path), keep_last=1) == []
    assert Path(steps[0]).exists()


# -------------------------------------------------------------------------------- crashes


@pytest.mark.parametrize("step", [
    pytest.param(2, id="fresh"), pytest.param(3, id="over a complete one", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_crash_at_any_write_leaves_a_whole_checkpoint(tmp_path: Path, step: int) -> None:
    """Step 1 stands throughout; step 3 is the old one, the new one, or does not count."""
    crash, done = 0, False
    saved(tmp_path / "before", 1, value=1.0)
    if step == 3:
        saved(tmp_path / "before", 3, value=2.0)
    while not done:
        crash += 1
        root = tmp_path / str(crash)
        shutil.copytree(tmp_path / "before", root)
        done = finished(lambda root=root: saved(root, 3, 3.0), crash)
        directory = checkpoint.step_directory(str(root), 3)
        if checkpoint.is_complete(directory):
            assert checkpoint.verify(directory) is None, "the marker came first or went last"
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            newest = checkpoint.newest_complete(str(root))
        target = tensors(0.0)
        assert newest is not None
        checkpoint.load_tensors(newest, target)
        number = checkpoint.load_state(newest)["step"]
        assert target["model"]["strength"] in ({1: (1,), 3: (2, 3)}[number])
        assert not done or target["model"]["strength"] == 3
        saved(root, 3, value=4.0)  # a partial try is no obstacle
        assert checkpoint.verify(directory) is None
    assert crash > 10, "the save made fewer changes than it must: nothing was crashed"


@pytest.mark.parametrize("room", [10_000, 100_000, 160_200])
def test_a_full_disk_is_called_so(tmp_path: Path, room: int) -> None:
    """torch.save hides it behind '[enforce fail at inline_container.cc] unexpected pos'."""
    previous = saved(tmp_path, 1)
    big = {"model": {"weight": torch.zeros(40_000)}}
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            checkpoint.save(checkpoint.step_directory(str(tmp_path), 2), big, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    with pytest.warns(UserWarning, match="no COMPLETE marker"):
        assert checkpoint.newest_complete(str(tmp_path)) == previous


# -------------------------------------------------------------------------------- hostile files


class Payload:
    """Writes a file when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (self.path,))


@pytest.fixture
def ran(tmp_path: Path) -> Iterator[Path]:
    """Where a payload leaves its trace; that plain pickle falls for it is checked first."""
    trace = tmp_path / "ran"
    pickle.loads(pickle.dumps(Payload(trace)))
    assert trace.exists()
    trace.unlink()
    yield trace
    assert not trace.exists(), "something in a checkpoint was executed"


def test_a_payload_in_the_metadata_is_refused(tmp_path: Path, ran: Path) -> None:
    directory = saved(tmp_path)
    path = Path(directory, ".metadata")
    honest = pickle.loads(path.read_bytes())
    honest.planner_data["model.strength"] = Payload(ran)
    for hostile in (honest, Payload(ran), [Payload(ran)]):
        path.write_bytes(pickle.dumps(hostile))
        reseal(directory)
        assert checkpoint.verify(directory) is None, "a hash says nothing of intent"
        with pytest.raises(UserError, match=r"\.metadata: names 'pathlib"):
            checkpoint.load_tensors(directory, tensors())
        with pytest.raises(UserError, match=r"\.metadata: names 'pathlib"):
            checkpoint.keys(directory)


def test_an_object_among_the_tensors_is_refused(tmp_path: Path, ran: Path) -> None:
    """DCP's own `load` unpickles such an object without limits: `weights_only` is for tensors."""
    directory = saved(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        stock = {"model": {"layer.weight": torch.zeros(3, 4), "strength": Payload(ran)}}
        dcp.save(stock, checkpoint_id=directory, no_dist=True)
        dcp.load({"model": {"strength": None}}, checkpoint_id=directory, no_dist=True)
    assert ran.exists(), "DCP fell for it, so there is something to refuse"
    ran.unlink()
    metadata = pickle.loads(Path(directory, ".metadata").read_bytes())
    metadata.storage_meta = None
    Path(directory, ".metadata").write_bytes(pickle.dumps(metadata))
    reseal(directory)
    with pytest.raises(UserError, match=r"a pickled object as 'model\.strength'"):
        checkpoint.load_tensors(directory, {"model": tensors()["model"]})


def test_a_payload_in_a_shard_is_refused(tmp_path: Path, ran: Path) -> None:
    directory = str(tmp_path / "c")
    checkpoint.save(directory, {"model": {"strength": torch.tensor(1.0)}}, {})
    shard, metadata = Path(directory, "__0_0.distcp"), Path(directory, ".metadata")
    torch.save(Payload(ran), shard)
    torch.load(shard, weights_only=False)
    assert ran.exists(), "the shard is loaded, were it not for weights_only"
    ran.unlink()
    parsed = pickle.loads(metadata.read_bytes())
    for place in parsed.storage_data.values():
        place.length = shard.stat().st_size
    metadata.write_bytes(pickle.dumps(parsed))
    reseal(directory)
    with pytest.raises(UserError, match="a shard holds more than tensors"):
        checkpoint.load_tensors(directory, {"model": {"strength": torch.tensor(0.0)}})


def test_state_and_marker_are_json(tmp_path: Path, ran: Path) -> None:
    directory = saved(tmp_path)
    Path(directory, "state.json").write_bytes(pickle.dumps(Payload(ran)))
    reseal(directory)
    with pytest.raises(UserError, match=r"state.json"):
        checkpoint.load_state(directory)
    Path(directory, "COMPLETE").write_bytes(pickle.dumps(Payload(ran)))
    with pytest.raises(UserError, match="COMPLETE"):
        checkpoint.load_tensors(directory, tensors())


def test_the_allowed_names_cannot_be_turned_against_the_process(tmp_path: Path) -> None:
    """Pickle's BUILD sets attributes, of classes too: DCP's own must not be within reach."""
    prefix = b"ctorch.distributed.checkpoint.metadata\nMetadata\n"
    poison = prefix + b"(N}S'__init__'\nctorch\nSize\nstb."
    before = dict(vars(dcp.Metadata))
    with pytest.raises(UserError, match="is no metadata of DCP"):
        parse_metadata(poison, set())
    assert dict(vars(dcp.Metadata)) == before
    for reach in (b"ctorch\nload\n.", b"ctorch\nfloat32.__class__\n.", b"cos\nsystem\n."):
        with pytest.raises(UserError, match="it is not opened"):
            parse_metadata(reach, set())


def test_metadata_cut_anywhere_is_a_sentence(tmp_path: Path) -> None:
    directory = saved(tmp_path)
    content = Path(directory, ".metadata").read_bytes()
    files = checkpoint.file_names(directory)
    assert (
        parse_metadata(content, files).state_dict_metadata.keys()
        == checkpoint.keys(directory).keys()
    )
    for length in range(len(content)):
        with pytest.raises(UserError, match="is no metadata of DCP"):
            parse_metadata(content[:length], files)
    with pytest.raises(UserError, match=r"'__0_0.distcp' that does not belong to it"):
        parse_metadata(content, [])


# -------------------------------------------------------------------------------- object storage


def test_a_remote_checkpoint_is_as_good_as_a_local_one(s3: str) -> None:
    root = storage.join(s3, "run/checkpoints")
    assert checkpoint.newest_complete(root) is None
    first, second, third = (saved(root, step, value=step) for step in (1, 2, 3))
    target = tensors(0.0)
    checkpoint.load_tensors(third, target)
    assert target["model"]["strength"] == 3
    assert checkpoint.load_state(third) == {"step": 3}
    shard = storage.join(third, "__0_0.distcp")
    content = bytearray(storage.read_bytes(shard))
    content[len(content) // 2] ^= 1
    storage.write_bytes(shard, bytes(content))
    with pytest.raises(UserError, match="sha256"):
        checkpoint.load_tensors(third, target)
    with pytest.warns(UserWarning, match="sha256"):
        assert checkpoint.newest_complete(root) == second
    saved(root, 3, value=4.0)
    checkpoint.load_tensors(third, target)
    assert target["model"]["strength"] == 4
    assert checkpoint.retain(root, keep_last=2) == [first]
    assert storage.list_dirs(root) == [second, third]


# -------------------------------------------------------------------------------- several ranks


def test_two_ranks_save_and_one_or_three_load(tmp_path: Path, s3: str) -> None:
    """FSDP2 model and AdamW state, locally and in object storage; a failing rank hangs nobody."""
    partial = tmp_path / "run/step_000002"
    partial.mkdir(parents=True)
    (partial / "__5_0.distcp").write_bytes(b"of a try that was killed")
    script = Path(__file__).with_name("checkpoint_ranks.py")
    subprocess.run([sys.executable, str(script), str(tmp_path), s3], check=True, timeout=300)

    for found in (json.loads((tmp_path / f"save_{rank}.json").read_text()) for rank in range(2)):
        assert "No space left on device" in found["write"]
        assert "No space left on device" in found["hash"]
        assert "No space left on device" in found["beside"]
        assert "'odd.lr' is a float" in found["leaf"]
        assert "not visible from rank 0" in found["unshared"]
    assert not list(tmp_path.glob("failed/*/COMPLETE")) + list(tmp_path.glob("machine*/*/COMPLETE"))
    for found in (json.loads((tmp_path / f"load_{rank}.json").read_text()) for rank in range(3)):
        assert (found["local"], found["s3"], found["beside"]) == ("same", "same", "same")
        assert "absent_" in found["absent"]
        assert "__1_0.distcp: does not have the sha256" in found["damaged"]

    shards = ["__0_0.distcp", "__1_0.distcp"]
    reference = torch.load(tmp_path / "reference_1.pt", weights_only=True)
    for directory in (str(partial), storage.join(s3, "run/step_000002")):
        assert checkpoint.verify(directory) is None
        assert checkpoint.file_names(directory, "__") == shards, "none of the killed try"
        target = {key: torch.full_like(value, 9.0) for key, value in reference.items()}
        checkpoint.load_tensors(directory, nested(target))
        assert all(torch.equal(target[key], value) for key, value in reference.items())
        each = {f"rank_{rank}": torch.zeros(3, dtype=torch.long) for rank in range(2)}
        checkpoint.load_tensors(directory, {"rng": each})
        assert [one[0].item() for one in each.values()] == [0, 1]
    assert not (partial / "__5_0.distcp").exists()


def nested(flat: dict[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """Two levels are enough: DCP joins the keys below the top with dots."""
    tree: dict[str, dict[str, torch.Tensor]] = {}
    for key, value in flat.items():
        top, below = key.split(".", 1)
        tree.setdefault(top, {})[below] = value
    return tree

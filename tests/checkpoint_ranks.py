"""The ranks of the checkpoint tests: `python checkpoint_ranks.py FOLDER S3`.

Two ranks save, then three load; what each finds it writes to FOLDER/{scene}_{rank}.json, for the
test to judge. A process of its own, because it forks ranks, so as to import torch once, which is
safe only while no thread of gloo or of an S3 client has been started.
"""

import errno
import json
import multiprocessing
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from bitray import checkpoint


def trained(steps: int) -> dict[str, Any]:
    """A sharded model (7 rows: unevenly) with AdamW after some steps, as a checkpoint takes it."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    for layer in (model[0], model[2]):
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        model(torch.randn(4, 5)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights, moments = get_state_dict(model, optimizer)
    return {"model": weights, "optimizer": checkpoint.tensors_only(moments)}


def whole(tensors: dict[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors unsharded by collectives, which is independent of how checkpoints are read."""
    flat = checkpoint.flatten(tensors)
    return {k: v.full_tensor() if isinstance(v, DTensor) else v for k, v in flat.items()}


def attempt(work: Callable[[], None]) -> str:
    """How a failure shows on this rank."""
    try:
        work()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing failed"


def save(folder: Path, s3: str) -> dict[str, str]:
    """Save locally over a partial try, save to S3, and fail in four ways."""
    rank, tensors = dist.get_rank(), trained(steps=2)
    torch.save(whole(tensors), folder / f"reference_{rank}.pt")
    tensors["rng"] = {f"rank_{rank}": torch.full((3,), rank)}
    for root in (str(folder), s3):
        checkpoint.save(
            f"{root}/run/step_000002", tensors, {"step": 2}, {"model/config.json": b"{}"}
        )
    full = OSError(errno.ENOSPC, "No space left on device")
    no_room = mock.patch.object(checkpoint._Writer, "write_data", side_effect=full)
    no_hash = mock.patch.object(checkpoint, "sha256", side_effect=full)
    found = {}
    for name, fault in (("write", no_room), ("hash", no_hash)):
        if rank == 1:
            fault.start()
        place = f"{folder}/failed/{name}"
        found[name] = attempt(lambda place=place: checkpoint.save(place, tensors, {}))
        if rank == 1:
            fault.stop()
    odd = tensors if rank == 0 else {**tensors, "odd": {"lr": 0.1}}
    found["leaf"] = attempt(lambda: checkpoint.save(f"{folder}/failed/leaf", odd, {}))
    found |= beside(folder, tensors)
    mine = f"{folder}/machine_{rank}/step_000001"
    found["unshared"] = attempt(lambda: checkpoint.save(mine, tensors, {}))
    return found


def beside(folder: Path, tensors: dict[str, Any]) -> dict[str, str]:
    """Save while training goes on: what is kept is what was there when the save began. A failure of
    one rank is raised on all of them, by the next call."""
    saver = checkpoint.Saver()
    saver.save(f"{folder}/beside/step_000001", tensors, {"step": 1})
    optimizer = tensors["optimizer"]
    for tensor in checkpoint.flatten({"model": tensors["model"]}).values():
        tensor.mul_(-1)  # training goes on
    saver.wait()
    for tensor in checkpoint.flatten({"model": tensors["model"]}).values():
        tensor.mul_(-1)
    assert optimizer is tensors["optimizer"] and saver.ready()
    full = OSError(errno.ENOSPC, "No space left on device")
    no_room = mock.patch.object(checkpoint._Writer, "write_data", side_effect=full)
    if dist.get_rank() == 1:
        no_room.start()
    saver.save(f"{folder}/failed/beside", tensors, {})
    found = attempt(lambda: saver.save(f"{folder}/failed/next", tensors, {}))
    if dist.get_rank() == 1:
        no_room.stop()
    saver.save(f"{folder}/beside/step_000002", tensors, {"step": 2})
    saver.wait()
    saver.close()
    return {"beside": found}


def load(folder: Path, s3: str) -> dict[str, str]:
    """Load what two ranks saved, from both places, and fail in two ways."""
    reference = torch.load(folder / "reference_0.pt", weights_only=True)
    found = {}
    for place, root in (("local", str(folder)), ("s3", s3)):
        tensors = trained(steps=1)
        checkpoint.load_tensors(f"{root}/run/step_000002", tensors)
        loaded = whole(tensors)
        same = all(torch.equal(loaded[key], value) for key, value in reference.items())
        found[place] = "same" if same and loaded.keys() == reference.keys() else "different"
    tensors = trained(steps=1)
    checkpoint.load_tensors(f"{folder}/beside/step_000001", tensors)
    loaded = whole(tensors)
    same = all(torch.equal(loaded[key], value) for key, value in reference.items())
    found["beside"] = "same" if same else "different"
    absent = {"model": {f"absent_{dist.get_rank()}": torch.zeros(1)}}
    found["absent"] = attempt(lambda: checkpoint.load_tensors(f"{folder}/run/step_000002", absent))
    found["damaged"] = attempt(lambda: checkpoint.load_tensors(f"{folder}/damaged", trained(1)))
    return found


def rank(scene: str, number: int, world: int, folder: str, s3: str) -> None:
    meeting = f"file://{folder}/meeting_{scene}"
    dist.init_process_group("gloo", init_method=meeting, rank=number, world_size=world)
    found = {"save": save, "load": load}[scene](Path(folder), s3)
    Path(folder, f"{scene}_{number}.json").write_text(json.dumps(found))
    dist.destroy_process_group()


def run(scene: str, world: int, folder: str, s3: str) -> None:
    fork = multiprocessing.get_context("fork").Process
    ranks = [fork(target=rank, args=(scene, each, world, folder, s3)) for each in range(world)]
    for each in ranks:
        each.start()
    for each in ranks:
        each.join()
    if any(each.exitcode for each in ranks):
        raise SystemExit(f"{scene}: exit codes {[each.exitcode for each in ranks]}")


def main(folder: str, s3: str) -> None:
    run("save", 2, folder, s3)
    damaged = Path(folder, "damaged")
    shutil.copytree(Path(folder, "run/step_000002"), damaged)
    shard = bytearray((damaged / "__1_0.distcp").read_bytes())
    shard[len(shard) // 2] ^= 1
    (damaged / "__1_0.distcp").write_bytes(shard)
    run("load", 3, folder, s3)


if __name__ == "__main__":
    main(*sys.argv[1:])

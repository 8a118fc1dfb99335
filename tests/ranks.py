"""Runs a function on workers of one process group, for what has to be right under FSDP2."""

import multiprocessing
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Workers are forked from a process that has all of this: importing takes longer than most of them.
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload([
    "hypothesis", "pytest", "torch.distributed.checkpoint", "torch.distributed.fsdp",
    "transformers.models.auto.modeling_auto", "transformers.models.llama.modeling_llama",
    "bitray.data.actor", "bitray.training.influence", "bitray.training.loop",
    "bitray.training.parallel", "bitray.training.teacher",
])  # fmt: skip


def run(function: Callable[..., Any], directory: Path, *args: Any, size: int = 2) -> list[Any]:
    """What `function(*args)`, which a module has by name, returns on each of the workers."""
    meeting = directory / uuid.uuid4().hex
    start(_rank, function, meeting, args, size, size=size)
    return [torch.load(f"{meeting}_{rank}.pt", weights_only=False) for rank in range(size)]


def start(function: Callable[..., Any], *args: Any, size: int) -> None:
    """Call `function(rank, *args)` in processes of its own; raises what one of them raised."""
    mp.start_processes(function, args, nprocs=size, start_method="forkserver")


def _rank(rank: int, function: Callable[..., Any], meeting: Path, args: tuple, size: int) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(str(meeting), size)
    dist.init_process_group("gloo", rank=rank, world_size=size, store=store)
    torch.save(function(*args), f"{meeting}_{rank}.pt")
    dist.destroy_process_group()

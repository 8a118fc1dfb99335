"""What a micro-batch takes: some steps of the real model in a process of its own, then thrown away.

`python -m bitray.training.trial` is that process. Other workers are not there: a process group
without communication shards the model as they would. Nothing of the run's own is touched.
"""

import itertools
import json
import math
import pickle
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from transformers import PreTrainedModel

from bitray.data.tickets import Deal
from bitray.models.batch import Batch
from bitray.models.convert import SubLNChoice, to_bitnet
from bitray.models.loading import skeleton
from bitray.models.losses import LossModel
from bitray.models.low_rank import add_corrections, corrected_layers, train_corrections_only
from bitray.models.sparse import TopK
from bitray.scratch import Scratch
from bitray.training.loop import Every, Loop, autocast_for
from bitray.training.parallel import parallelize, with_losses, world
from bitray.training.settings import TrainingSettings
from bitray.training.teacher import Teacher, placed
from bitray.training.teacher_settings import Actors, Server, Teachers

LOOK_SECONDS = 0.02
TIMED_STEPS = 3
"""Steps whose median time is a trial's; one more before them warms up."""


@dataclass(frozen=True)
class Trial:
    """A worker's part of a stage. Models are given by their transformers configs, in JSON."""

    settings: TrainingSettings
    model: str
    teacher: Teachers
    teacher_model: str
    subln: SubLNChoice | None
    """None: the stage is dense."""
    device: str
    rank: int
    world: int
    timed: bool = False
    """Whether its rate is wanted too, which takes some more steps."""


def candidates(rows: int, workers: int) -> list[int]:
    """Micro-batches, ascending, that cut a global batch evenly and leave no worker idle."""
    most = max(1, rows // workers)
    return [size for size in range(1, most + 1) if rows % size == 0]


def largest(sizes: list[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending sizes that fits, by bisection; None where the least does not."""
    low, high = 0, len(sizes)
    while low < high:
        middle = (low + high) // 2
        low, high = (middle + 1, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low - 1] if low else None


def peak(trial: Trial, batch_size: int, limit: float) -> float:
    """Bytes that a trial takes at most, infinite where it came to more than `limit` or to an end.
    On GPUs of GPU memory, on CPUs of resident memory, watched while it grows."""
    return tried(trial, batch_size, limit)[0]


def tried(trial: Trial, batch_size: int, limit: float) -> tuple[float, float]:
    """As `peak`, and the worker's tokens per second where the trial is timed, else NaN. What other
    workers would cost in communication is not in it."""
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            [sys.executable, "-m", __name__],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
        )  # fmt: skip
        assert process.stdin is not None and process.stdout is not None
        process.stdin.write(pickle.dumps((trial, batch_size)))
        process.stdin.close()
        while process.poll() is None:
            if trial.device == "cpu" and resident(process.pid) > limit:
                process.kill()
            time.sleep(LOOK_SECONDS)
        if process.returncode < 0:  # killed: by us, or by a machine out of memory
            return math.inf, math.nan
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"a trial of a micro-batch failed:\n{said.read().decode()}")
        taken, rate = json.loads(process.stdout.read().splitlines()[-1])
        return float(taken), float(rate)


def resident(pid: int) -> float:
    """Bytes of memory that a process has; 0 if there is none."""
    try:
        pages = Path(f"/proc/{pid}/statm").read_text().split()[1]
    except (FileNotFoundError, ProcessLookupError, IndexError):  # it has just ended
        return 0.0
    return float(pages) * resource.getpagesize()


def memory(device: str, workers: int) -> float:
    """Bytes that a worker may take: of its GPU all, of this machine its share of what is free."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[1])
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    group = Path("/sys/fs/cgroup")
    if (group / "memory.max").is_file():
        most = (group / "memory.max").read_text().strip()
        used = float((group / "memory.current").read_text())
        free = free if most == "max" else min(free, float(most) - used)
    return free / workers


# --------------------------------------------------------------------------------- in the process


def measured(trial: Trial, batch_size: int) -> tuple[float, float]:
    """Peak bytes of the steps in which the stage takes most, infinite if a GPU has not so much; and
    tokens per second."""
    device = torch.device(trial.device)
    try:
        rate = _some_steps(trial, batch_size, device)
    except torch.OutOfMemoryError:
        return math.inf, math.nan
    if device.type == "cuda":
        return float(torch.cuda.max_memory_reserved(device)), rate
    # ru_maxrss would be that of the process which started this one, where that was larger.
    lines = Path("/proc/self/status").read_text().splitlines()
    high = next(float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return high, rate


def _some_steps(trial: Trial, batch_size: int, device: torch.device) -> float:
    """Tokens per second of the steps of the stage's end, if they are timed."""
    if trial.world > 1:
        _alone_among(trial.rank, trial.world)
    tickets = min(trial.settings.rows_per_step // batch_size, 2 * trial.world)
    settings = trial.settings.model_copy(
        update={
            "batch_size": batch_size,
            "gradient_accumulation_steps": tickets,
            "max_skipped_steps": sys.maxsize,  # without the others' shares sums mean nothing
        }
    )
    student = _model(trial.model, trial.subln)
    if settings.needs_mask_token:
        student.config.mask_token_id = student.config.vocab_size - 1
    if settings.lrc is not None:
        if not corrected_layers(student):
            add_corrections(student, settings.lrc.rank)
        train_corrections_only(student)
    model = with_losses(student, settings, device).train()
    parallelize(model, settings, device)
    optimizer = settings.optimizer.build(model)
    _take_state(model, optimizer)
    autocast = autocast_for(device, settings.precision)
    teacher = _teacher(trial, device, autocast) if settings.needs_teacher else None
    steps, ends = telling_steps(settings), [time.perf_counter()]
    steps += [settings.total_steps - 1] * (1 + TIMED_STEPS) * trial.timed
    loop = _Silent("trial", model, optimizer, settings, device, autocast, teacher)

    def go_on(each: Loop) -> None:
        ends.append(time.perf_counter())
        if steps:
            each.position.schedule_step = steps.pop()
        else:
            each.stopped = True

    loop.hooks = [Every(1, go_on)]
    loop.position.schedule_step = steps.pop()
    loop.run(_made_up(tickets, batch_size, settings.max_seq_length, student.config.vocab_size))
    if not trial.timed:
        return math.nan
    seconds = statistics.median(b - a for a, b in itertools.pairwise(ends[1 : 2 + TIMED_STEPS]))
    mine = len(Deal(tickets, trial.world).step(trial.rank, 0))
    return mine * batch_size * settings.max_seq_length / seconds


class _Silent(Loop):
    """Tells nobody: the other workers are made up, and so would be what they answer."""

    def write(self, metrics: dict[str, float]) -> None: ...


def _teacher(trial: Trial, device: torch.device, autocast: torch.autocast) -> Teacher:
    """The teacher as it would lie here, or what would come of one that is far away."""
    kind = trial.teacher
    if isinstance(kind, Actors | Server):
        heat = trial.settings.asked_at

        def answer(batch: Batch, layers: bool, attention: int | None = None) -> TopK:
            rows, length = batch.input_ids.shape
            return TopK.blank(rows, length, kind.top_k, kind.top_k + 1, heat).to(device)

        return answer
    low = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = _model(trial.teacher_model, None)
    model.to(low)  # type: ignore[arg-type, unused-ignore]
    return placed(kind, model, device, autocast)


def telling_steps(settings: TrainingSettings) -> list[int]:
    """Steps that stand for all others: each set of objectives, blended and fully quantised."""
    found: dict[tuple[frozenset[str], bool], int] = {}
    for step in {0, settings.total_steps - 1, *settings.turns}:
        full = settings.strength(step, 0.0) == 1
        found.setdefault((frozenset(settings.weights(step)), full), step)
    return list(found.values())


def _alone_among(rank: int, world: int) -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())


def _model(config: str, subln: SubLNChoice | None) -> PreTrainedModel:
    """The model of a config, its weights anything that is finite."""
    with Scratch() as folder:
        (Path(folder) / "config.json").write_text(config)
        model = skeleton(folder)
    model = model if subln is None else to_bitnet(model, subln)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return model


def _take_state(model: LossModel, optimizer: torch.optim.Optimizer) -> None:
    """A step without gradients worth the name: they may not be finite later on."""
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def _made_up(tickets: int, rows: int, length: int, vocabulary: int) -> Iterator[tuple[int, Batch]]:
    ids = np.random.default_rng(0).integers(0, vocabulary, (rows, length)).astype(np.int32)
    batch = Batch.from_rows(ids, [[length]] * rows, [0] * rows)
    rank, size = world()
    for step in itertools.count():
        for ticket in Deal(tickets, size).step(rank, step):
            yield ticket, batch


if __name__ == "__main__":
    print(json.dumps(measured(*pickle.loads(sys.stdin.buffer.read()))))

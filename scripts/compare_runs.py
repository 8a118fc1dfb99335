"""Do two configurations compute the same? Cosines of what the models say, and losses of some steps.

Both start from the same weights and see the same random packed rows; each goes through the very
loop that training uses, on as many workers (gloo, or NCCL on GPUs) as its `scaling.num_workers`
says, without Ray. Compared are logits and hidden states before the first step, the gradients of
the first step, and the losses of all steps. Exit status 1 if anything differs by more than the
tolerance: 1 - cosine, or for losses the relative difference.
"""

import argparse
import copy
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from bitray import Config
from bitray.data.tickets import EMPTY, Deal
from bitray.inference.evaluation import evaluate
from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.families import decoder_layers
from bitray.models.loading import build_model, load_model, save_model
from bitray.models.losses import LossModel, Term, capturing
from bitray.models.low_rank import add_corrections, init_corrections, train_corrections_only
from bitray.models.mask_token import learn_mask_token, mask_token_id
from bitray.nn import LowRank, set_strength
from bitray.settings import UserError
from bitray.training.loop import Every, Loop, autocast_for
from bitray.training.parallel import parallelize, with_losses, world
from bitray.training.settings import TrainingSettings
from bitray.training.state import Position
from bitray.training.teacher import InProcessTeacher, open_teacher

EXAMPLES = """
examples:
  python scripts/compare_runs.py --b training.torch_compile.enabled=true
  python scripts/compare_runs.py --stage stage1_9 --b training.activation_checkpointing=true
  python scripts/compare_runs.py --a scaling.num_workers=1 --b scaling.num_workers=2
  python scripts/compare_runs.py model=smollm2_135m --a training.precision=fp32 \\
      --b training.precision=bf16 --tolerance 1e-2 --json
"""
WRAPPER = "_checkpoint_wrapped_module."
REFUSED = "refused.txt"
Kind = dict[str, Tensor]


@dataclass
class Found:
    """What a configuration computes, on the CPU."""

    logits: Kind = field(default_factory=dict)
    hidden: Kind = field(default_factory=dict)
    gradients: Kind = field(default_factory=dict)
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    """Of every step."""
    peak: float = 0.0
    """Bytes on the device at most; on CPUs those of the process."""

    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        """As a sink of metrics."""
        self.losses.append(metrics["train/loss"])

    def flush(self) -> None: ...
    def close(self) -> None: ...


# --------------------------------------------------------------------------------------- one side


def measured(config: Config, stage: str, steps: int, own_process: bool = False) -> Found:
    """A configuration's numbers, from as many processes as it has workers; one works here, unless
    its memory is to be measured. `UserError` for what cannot be."""
    with tempfile.TemporaryDirectory() as folder:
        workers, refused = config.scaling_of(stage).most, Path(folder) / REFUSED
        if workers > 1 or own_process:
            try:
                mp.spawn(_told, (config, stage, steps, folder), nprocs=workers)
            except mp.ProcessRaisedException:
                if not refused.exists():
                    raise
                raise UserError(refused.read_text()) from None
        else:
            _worker(0, config, stage, steps, folder)
        return torch.load(Path(folder) / "found.pt", weights_only=False)


def _told(rank: int, *given: Any) -> None:
    """A worker in a process of its own, whose `UserError` the one that started it is told."""
    try:
        _worker(rank, *given)
    except UserError as error:
        (Path(given[-1]) / REFUSED).write_text(str(error))
        raise


def _worker(rank: int, config: Config, stage: str, steps: int, folder: str) -> None:
    scaling = config.scaling_of(stage)
    gpu, workers = scaling.use_gpu, scaling.most
    device = torch.device("cuda", rank) if gpu else torch.device("cpu")
    if gpu:
        torch.cuda.set_device(device)
    if workers > 1:
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(workers))
        store = dist.FileStore(str(Path(folder) / "store"), workers)
        backend = "nccl" if gpu else "gloo"
        dist.init_process_group(backend, rank=rank, world_size=workers, store=store)
    found = _measure(config, stage, steps, device, folder)
    if rank == 0:
        torch.save(found, Path(folder) / "found.pt")
    if workers > 1:
        dist.destroy_process_group()


def _measure(config: Config, stage: str, steps: int, device: torch.device, folder: str) -> Found:
    settings = config.stages[stage].model_copy(update={"max_steps": steps, "log_every": 1})
    model, teacher = _models(config, stage, settings, device, folder)
    vocabulary = mask_token_id(model.config) or model.config.vocab_size
    wrapped = with_losses(model, settings, device)
    parallelize(wrapped, settings, device, config.scaling_of(stage).sharding == "hybrid")
    autocast, found = autocast_for(device, settings.precision), Found()
    _probe(wrapped, rows(settings, 0, vocabulary).to(device), autocast, found)
    optimizer = settings.optimizer.build(wrapped)
    names = {id(p): name.replace(WRAPPER, "") for name, p in wrapped.named_parameters()}

    def first_gradients(*_: Any) -> None:
        for group in optimizer.param_groups if not found.gradients else ():
            found.gradients |= {
                names[id(p)]: _whole(p.grad) for p in group["params"] if p.grad is not None
            }

    clock = [time.perf_counter()]

    def tick(_: Loop) -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        clock.append(time.perf_counter())

    handle = optimizer.register_step_pre_hook(first_gradients)
    loop = Loop(
        stage, wrapped, optimizer, settings, device, autocast, teacher, Position(),
        hooks=[Every(1, tick)], sinks=[found],
    )  # fmt: skip
    loop.run(tickets(settings, vocabulary))
    handle.remove()
    found.seconds = [b - a for a, b in itertools.pairwise(clock)]
    found.peak = _peak(device)
    return found


def _models(
    config: Config, stage: str, settings: TrainingSettings, device: torch.device, folder: str
) -> tuple[PreTrainedModel, InProcessTeacher | None]:
    """The student of a stage, with all that the stage adds to it, and its teacher: the same model
    in full precision."""
    torch.manual_seed(settings.seed)
    shape, path = config.model.config, str(config.model.path)
    dense = build_model(shape) if shape is not None else load_model(path, config.model.revision)
    teacher, autocast = None, autocast_for(device, settings.precision)
    if settings.needs_teacher:
        if config.model.teacher.remote:
            raise UserError("model.teacher: a remote one cannot be compared here; take in_process")
        if world()[0] == 0:
            save_model(copy.deepcopy(dense).cpu(), f"{folder}/teacher")
        if dist.is_initialized():
            dist.barrier()
        teacher = open_teacher(config.model.teacher, f"{folder}/teacher", device, autocast)
    batch = rows(settings, 0, dense.config.vocab_size)
    weights = copy.deepcopy(dense.state_dict()) if settings.lrc is not None else {}
    model = dense if config.stages[stage].dense else _ternary(config, dense, batch)
    if settings.needs_mask_token and mask_token_id(model.config) is None:
        learn_mask_token(model, model.config.vocab_size)
    if settings.lrc is not None:
        model.to(device)  # type: ignore[arg-type]  # transformers types `to` away
        _correct(model, settings.lrc, weights, batch.to(device), autocast)
    return model, teacher


def _ternary(config: Config, dense: PreTrainedModel, batch: Batch) -> PreTrainedModel:
    wanted = config.model.quantization
    calibrated = wanted.subln_init == "calibrated" and wanted.subln != "none"
    return to_bitnet(dense, wanted.subln, batch if calibrated else None)


def _correct(
    model: PreTrainedModel, wanted: LowRank, weights: Kind, batch: Batch, autocast: torch.autocast
) -> None:
    """Add low-rank corrections, and train nothing else."""

    def loss() -> float:
        return evaluate(LossModel(model), {"": [batch]}, batch.input_ids.device, autocast)[""]

    add_corrections(model, wanted.rank)
    init_corrections(model, wanted, weights, batch, loss)
    train_corrections_only(model)


def rows(settings: TrainingSettings, ticket: int, vocabulary: int) -> Batch:
    """A micro-batch of random tokens, two documents and some padding to a row."""
    draw = np.random.default_rng([settings.seed, abs(ticket)])
    size, length = settings.batch_size, settings.max_seq_length
    ids = draw.integers(0, vocabulary, (size, length)).astype(np.int32)
    cuts = draw.integers(2, length - 2, size)
    ends = draw.integers(cuts + 1, length + 1)
    lengths = [[int(cut), int(end - cut)] for cut, end in zip(cuts, ends, strict=True)]
    return Batch.from_rows(ids, lengths if ticket != EMPTY else [[]] * size, [0] * size)


def tickets(settings: TrainingSettings, vocabulary: int) -> Iterator[tuple[int, Batch]]:
    """This worker's micro-batches."""
    rank, size = world()
    deal = Deal(settings.gradient_accumulation_steps, size)
    for step in range(settings.total_steps):
        for ticket in deal.step(rank, step):
            yield ticket, rows(settings, ticket, vocabulary)


class _Keep:
    """A head objective that keeps all logits."""

    needs_teacher = on_masked = False

    def __init__(self) -> None:
        self.chunks: list[Tensor] = []

    def on_logits(self, logits: Tensor, labels: Tensor, teacher: Any) -> tuple[Tensor, Kind]:
        self.chunks.append(logits.detach().cpu())
        return logits.new_zeros(()), {}


def _probe(model: LossModel, batch: Batch, autocast: torch.autocast, found: Found) -> None:
    """Logits and hidden states at strength 1, in the layout of training."""
    set_strength(model, 1.0)
    keep = _Keep()
    with torch.no_grad(), autocast, capturing(decoder_layers(model.model)) as outputs:
        model(batch, [Term("keep", keep, 1.0)])
    if isinstance(model, FSDPModule):  # else the optimizer would be given what is gathered
        model.reshard()
    found.logits = {"logits": torch.cat(keep.chunks)}
    real = batch.real
    found.hidden = {f"layer {at}": out[real].float().cpu() for at, out in enumerate(outputs)}


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.detach().float().cpu().clone()


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    status = Path("/proc/self/status")  # of this program alone; elsewhere since it was forked
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return 1024 * float(line.split()[1])
    import resource

    return float(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # bytes on macOS


# ------------------------------------------------------------------------------------- comparing


class Difference(NamedTuple):
    """The worst of one kind of quantity."""

    what: str
    worst: str
    """Where: a row of logits, a layer, a parameter, a step."""
    cosine: float | None
    relative: float
    """|a - b| / |a|."""

    def within(self, tolerance: float) -> bool:
        """A difference that is not a number is not within anything."""
        distance = self.relative if self.cosine is None else 1 - self.cosine
        return distance <= tolerance


def cosine(a: Tensor, b: Tensor) -> float:
    """In fp64; 1 for two zeros, 0 for one."""
    a, b = a.double().flatten(), b.double().flatten()
    if not a.any() or not b.any():
        return float(a.any() == b.any())
    return float(a @ b / (a.norm() * b.norm()))


def relative(a: Tensor, b: Tensor) -> float:
    """|a - b| / |a|."""
    a, b = a.double(), b.double()
    return float((a - b).norm() / a.norm().clamp_min(torch.finfo(torch.float64).tiny))


def difference(what: str, name: str, a: Tensor | None, b: Tensor | None) -> Difference:
    """Nothing is alike of what only one of them has, or has in another shape."""
    if a is None or b is None or a.shape != b.shape:
        return Difference(what, f"{name}, which is not the same kind of thing in both", 0.0, 1.0)
    return Difference(what, name, cosine(a, b), relative(a, b))


def compared(a: Found, b: Found) -> list[Difference]:
    """The worst of every kind."""
    found = []
    for what in ("logits", "hidden", "gradients"):
        mine, theirs = getattr(a, what), getattr(b, what)
        each = [difference(what, k, mine.get(k), theirs.get(k)) for k in mine | theirs]
        found.append(max(each, key=lambda d: 1 - d.cosine if d.cosine == d.cosine else 2))
    steps = enumerate(zip(a.losses, b.losses, strict=True), 1)
    losses = [
        Difference("losses", f"step {step}", None, abs(x - y) / max(abs(x), 1e-12))
        for step, (x, y) in steps
    ]
    return [*found, max(losses, key=lambda d: d.relative if d.relative == d.relative else 2)]


def table(header: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """Columns of text."""
    every = [list(header), *map(list, lines)]
    widths = [max(len(line[at]) for line in every) for at in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in every
    )


def configured(words: Sequence[str], stage: str) -> Config:
    """A configuration that has the stage and steps to take in it."""
    config = Config.load(None, list(words))
    if stage not in config.stages or not config.stages[stage].total_steps:
        known = [name for name, each in config.stages.items() if each.total_steps]
        raise UserError(f"--stage {stage}: this pipeline trains {', '.join(known)}")
    return config


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EXAMPLES, formatter_class=layout)
    parser.add_argument("words", nargs="*", help="overrides of both configurations")
    parser.add_argument("--a", nargs="+", default=[], metavar="WORD", help="overrides of the first")
    parser.add_argument("--b", nargs="+", default=[], metavar="WORD", help="and of the second")
    parser.add_argument("--stage", default="stage2")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--tolerance", type=float, default=1e-4)
    parser.add_argument("--json", action="store_true")
    said = parser.parse_intermixed_args()
    try:
        sides = [configured([*said.words, *own], said.stage) for own in (said.a, said.b)]
        found = compared(*(measured(side, said.stage, said.steps) for side in sides))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    wrong = [each for each in found if not each.within(said.tolerance)]
    if said.json:
        lines = [each._asdict() for each in found]
        print(json.dumps({"same": not wrong, "tolerance": said.tolerance, "differences": lines}))
    else:
        shown = [
            (d.what, "-" if d.cosine is None else f"{d.cosine:.9f}", f"{d.relative:.2e}", d.worst)
            for d in found
        ]
        print(table(("", "cosine", "relative", "worst at"), shown))
        verdict = f"differ: {', '.join(d.what for d in wrong)}" if wrong else "the same"
        print(f"\n{verdict} (tolerance {said.tolerance:g})")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())

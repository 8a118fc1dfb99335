"""Teachers that live beside the student, in the same process: whole, sharded, offloaded, 4-bit.

Every one is a frozen model whose own forward is run; only where its weights lie differs.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from transformers import PreTrainedModel

from bitray.models.batch import Batch
from bitray.models.families import decoder_layers
from bitray.models.loading import load_model
from bitray.models.losses import TeacherOutput, run_teacher
from bitray.models.sparse import TopK, with_rest
from bitray.settings import UserError
from bitray.training.parallel import world
from bitray.training.teacher_settings import FourBit, InProcess, Offload

CPU_BLOCK = 64
"""Weights that share a scale in bitsandbytes' 4 bits; on CPUs they have to lie in one row."""


@runtime_checkable
class Teacher(Protocol):
    """Answers a batch with what the objectives compare the student to."""

    def __call__(
        self, batch: Batch, layers: bool, attention: int | None = None
    ) -> TeacherOutput | TopK: ...


class InProcessTeacher:
    """A frozen model in this process."""

    def __init__(self, model: PreTrainedModel, autocast: torch.autocast) -> None:
        assert not any(p.requires_grad for p in model.parameters()), "a teacher is frozen"
        self.model, self.autocast = model.eval(), autocast

    def __call__(self, batch: Batch, layers: bool, attention: int | None = None) -> TeacherOutput:
        with self.autocast:
            return run_teacher(self.model, batch, layers, attention)


def open_teacher(
    settings: InProcess | Offload | FourBit,
    path: str,
    device: torch.device,
    autocast: torch.autocast,
    revision: str | None = None,
) -> InProcessTeacher:
    """The teacher at `path`, laid out as the settings say; bf16 on GPUs, fp32 on CPUs."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    return placed(settings, load_model(path, revision, dtype), device, autocast)


def placed(
    settings: InProcess | Offload | FourBit,
    model: PreTrainedModel,
    device: torch.device,
    autocast: torch.autocast,
) -> InProcessTeacher:
    """This model as a teacher, laid out as the settings say."""
    model = model.requires_grad_(False).eval()
    if isinstance(settings, Offload):
        offload(model, device)
    elif isinstance(settings, FourBit):
        quantize_4bit(model, settings, model.dtype, device)
        model.to(device)  # type: ignore[arg-type, unused-ignore]
    else:
        count = sum(p.numel() for p in model.parameters())
        if settings.sharded(count, world()[1]):
            shard(model, device)
        model.to(device)  # type: ignore[arg-type, unused-ignore]
    return InProcessTeacher(model, autocast)


def shard(model: PreTrainedModel, device: torch.device) -> None:
    """FSDP2, frozen: each worker keeps its part and gathers a layer for as long as it computes."""
    mesh = init_device_mesh(device.type, (world()[1],))
    for layer in decoder_layers(model):
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh, reshard_after_forward=True)


def quantize_4bit(
    model: PreTrainedModel, settings: FourBit, dtype: torch.dtype, device: torch.device
) -> None:
    """Replace the decoder layers' linear layers by bitsandbytes' 4-bit ones, in place.

    What transformers' `BitsAndBytesConfig` makes of a Hugging Face folder, but of a checkpoint of
    ours as well. The weights are quantised when they reach their device. `UserError` for sizes that
    bitsandbytes' product on CPUs gets wrong.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    for layer in decoder_layers(model):
        for parent in list(layer.modules()):
            for name, linear in list(parent.named_children()):
                if type(linear) is not nn.Linear:
                    continue
                if device.type == "cpu" and linear.in_features % CPU_BLOCK:
                    raise UserError(
                        f"model.teacher: in 4 bits on CPUs the inputs of every layer have to be a "
                        f"multiple of {CPU_BLOCK}; {name} has {linear.in_features}; take in_process"
                    )
                with torch.device("meta"):
                    new = Linear4bit(
                        linear.in_features, linear.out_features, compute_dtype=dtype, bias=False,
                        quant_type=settings.quant_type, compress_statistics=settings.double_quant,
                    )  # fmt: skip
                new.weight = Params4bit(
                    linear.weight.data, requires_grad=False, module=new,
                    quant_type=settings.quant_type, compress_statistics=settings.double_quant,
                )  # fmt: skip
                new.bias = linear.bias
                setattr(parent, name, new)


# ------------------------------------------------------------------------------------- offloading


def offload(model: PreTrainedModel, device: torch.device) -> None:
    """Keep the decoder layers in main memory; the rest goes to the device. In place."""
    layers = decoder_layers(model)
    kept = {id(p) for layer in layers for p in layer.parameters()}
    for parameter in model.parameters():
        if id(parameter) not in kept:
            parameter.data = parameter.data.to(device)
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(device))
    streamed = [_Layer(layer, device) for layer in layers]
    most = max(len(layer.home) for layer in streamed)
    places = itertools.cycle([_Place(most, device), _Place(most, device)])
    for layer, following in zip(streamed, [*streamed[1:], streamed[0]], strict=True):
        layer.module.register_forward_pre_hook(_arrive(layer, following, places))
        layer.module.register_forward_hook(_leave(layer))


def _arrive(
    layer: "_Layer", following: "_Layer", places: Iterator["_Place"]
) -> Callable[..., None]:
    def hook(*_: Any) -> None:
        if layer.place is None:  # only the very first is not on its way yet
            layer.fetch(next(places))
        layer.arrived()
        if following is not layer:
            following.fetch(next(places))

    return hook


def _leave(layer: "_Layer") -> Callable[..., None]:
    return lambda *_: layer.leave()


class _Place:
    """Memory on the device for one layer, and the stream that fills it.

    Two of them take turns: while a layer computes in one, the next is copied into the other.
    """

    def __init__(self, size: int, device: torch.device) -> None:
        self.memory = torch.empty(size, dtype=torch.uint8, device=device)
        cuda = device.type == "cuda"
        self.stream = torch.cuda.Stream(device) if cuda else None
        self.free = torch.cuda.Event() if cuda else None
        """When whoever computed here last has finished."""


class _Layer:
    """A decoder layer whose weights lie in one piece of (on GPUs pinned) main memory."""

    ALIGNED = 16

    def __init__(self, module: nn.Module, device: torch.device) -> None:
        self.module, self.place = module, None  # type: nn.Module, _Place | None
        self.parameters = list(module.parameters())
        self.starts: list[int] = []
        size = 0
        for parameter in self.parameters:
            self.starts.append(size)
            size += -(-parameter.nbytes // self.ALIGNED) * self.ALIGNED
        self.home = torch.empty(size, dtype=torch.uint8, pin_memory=device.type == "cuda")
        for parameter, part in zip(self.parameters, self.parts(self.home), strict=True):
            parameter.data = part.copy_(parameter.data)

    def parts(self, memory: Tensor) -> list[Tensor]:
        """Views of a piece of memory as the parameters."""
        return [
            memory[start : start + p.nbytes].view(p.dtype).view(p.shape)
            for start, p in zip(self.starts, self.parameters, strict=True)
        ]

    def fetch(self, place: _Place) -> None:
        """Begin the copy to the device, behind the last computation in the same place."""
        self.place = place
        with torch.cuda.stream(place.stream):
            if place.stream is not None and place.free is not None:
                place.stream.wait_event(place.free)
            place.memory[: len(self.home)].copy_(self.home, non_blocking=True)

    def arrived(self) -> None:
        """Compute from the copy, once it is there."""
        assert self.place is not None
        if self.place.stream is not None:
            torch.cuda.current_stream(self.place.memory.device).wait_stream(self.place.stream)
        self._point_to(self.place.memory)

    def leave(self) -> None:
        """Its place may be used by another layer as soon as this one has computed."""
        assert self.place is not None
        if self.place.free is not None:
            self.place.free.record(torch.cuda.current_stream(self.place.memory.device))
        self.place = None
        self._point_to(self.home)

    def _point_to(self, memory: Tensor) -> None:
        for parameter, part in zip(self.parameters, self.parts(memory), strict=True):
            parameter.data = part


# ----------------------------------------------------------------------------- what is sent away


@torch.no_grad()
def top_k_of(
    teacher: InProcessTeacher, batch: Batch, k: int, temperature: float, chunk: int = 2048
) -> TopK:
    """What a remote teacher sends about the real tokens of a batch, on the CPU."""
    told = teacher(batch, layers=False)
    rows, length = batch.input_ids.shape
    k = min(k, len(told.head))
    answer = TopK.blank(rows, length, k, min(k + 1, len(told.head)), temperature)
    real, head = batch.real.flatten().nonzero().squeeze(1), told.head
    for places in real.split(chunk):
        hidden = told.hidden.flatten(0, 1)[places].to(head.dtype)
        logp = F.log_softmax(F.linear(hidden, head).float() / temperature, -1)
        ids = logp.topk(k, dim=-1).indices
        at = places.cpu()
        answer.ids.flatten(0, 1)[at] = ids.int().cpu()
        answer.logp.flatten(0, 1)[at] = with_rest(logp, ids).cpu()
    return answer

"""What a stage is at a step, and how it goes into a checkpoint and comes out again."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

from bitray import checkpoint
from bitray.models.losses import LossModel
from bitray.nn.curricula import column_ranges, load_column_ranges
from bitray.optim import Norms
from bitray.settings import UserError
from bitray.training.parallel import world
from bitray.training.plateau import Plateau
from bitray.training.settings import Resume

_FLAT = StateDictOptions(flatten_optimizer_state_dict=True)


@dataclass
class Position:
    """Where a stage stands. All else is a function of it, or tensors. JSON in a checkpoint."""

    step: int = 0
    """Optimizer steps taken, skipped ones included."""
    schedule_step: int = 0
    """Place in the schedules; differs from `step` only if a resumed run was told so."""
    tokens: int = 0
    """Real tokens trained on, over all workers."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    strength: float = 0.0
    initial_strength: float = 0.0
    """Strength at which the predecessor ended."""
    best: float | None = None
    """Lowest mean held-out loss so far."""
    norms: Norms = field(default_factory=Norms)
    """What ZClip knows of gradient norms."""
    losses: Norms = field(default_factory=Norms)
    """What is known of losses, to tell a spike."""
    plateau: Plateau = field(default_factory=Plateau)
    ended: str | None = None
    """Why the stage has ended before its last step."""
    factors: dict[str, float] = field(default_factory=dict)
    """Factors of objectives that were measured, such as the gamma of attention_distill."""

    @classmethod
    def from_json(cls, held: dict[str, Any]) -> "Position":
        """What `as_json` made of it."""
        kinds = {"norms": Norms, "losses": Norms, "plateau": Plateau}
        return cls(**held | {name: kind(*held.get(name, ())) for name, kind in kinds.items()})


def tensors_of(model: LossModel, optimizer: torch.optim.Optimizer | None) -> dict[str, Any]:
    """State dicts by their Hugging Face names, sharded where the model is."""
    tensors: dict[str, Any] = {"model": get_model_state_dict(model.model)}
    if optimizer is not None and optimizer.state:
        # Settings of the groups (rates, betas) are the configuration's, not the checkpoint's.
        # Before the first real step there is no state, and asking for it would make one up.
        tensors["optimizer"] = checkpoint.tensors_only(_optimizer_state(model, optimizer))
    if ranges := column_ranges(model.model):
        tensors["saliency"] = ranges
    return tensors


def _optimizer_state(model: LossModel, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """By parameter name, so that any world size finds its part."""
    return get_optimizer_state_dict(model.model, optimizer, options=_FLAT)


def save(
    directory: str,
    model: LossModel,
    optimizer: torch.optim.Optimizer,
    state: dict[str, Any],
    files: Mapping[str, bytes],
) -> None:
    """Write a checkpoint; every worker calls it. `files` describe the model (`model/...`)."""
    checkpoint.save(directory, tensors_of(model, optimizer), state, files)


def load_model(
    directory: str, model: LossModel, strict: bool = True, say: Callable[[str], None] = print
) -> None:
    """Take over the weights of a checkpoint; every worker calls it, and the first one says what is
    left out."""
    tensors = tensors_of(model, None)
    if not strict:
        tensors = _common(directory, tensors, say)
    checkpoint.load_tensors(directory, tensors, strict=strict)
    set_model_state_dict(model.model, tensors["model"], options=StateDictOptions(strict=strict))


def _common(directory: str, tensors: dict[str, Any], say: Callable[[str], None]) -> dict[str, Any]:
    """What both sides have in the same shape; the rest is named, once."""
    here = {f"model.{name}": tuple(value.shape) for name, value in tensors["model"].items()}
    held = {name: s for name, s in checkpoint.keys(directory).items() if name.startswith("model.")}
    both = here.keys() & held.keys()
    left_out = {
        "only the model has": here.keys() - both,
        "only the checkpoint has": held.keys() - both,
        "of another shape are": {name for name in both if here[name] != held[name]},
    }
    told = [f"{what} {_names(names)}" for what, names in left_out.items() if names]
    if told and world()[0] == 0:
        say(f"not loaded from {directory}: {'; '.join(told)}")
    kept = both - left_out["of another shape are"]
    return {"model": {n: value for n, value in tensors["model"].items() if f"model.{n}" in kept}}


def _names(names: Iterable[str]) -> str:
    return ", ".join(sorted(name.removeprefix("model.") for name in names))


def load_saliency(directory: str, model: LossModel) -> None:
    """Take over the running ranges of columns, if the checkpoint has any."""
    shapes = checkpoint.keys(directory)
    held = {
        name.removeprefix("saliency."): torch.empty(shape)
        for name, shape in shapes.items()
        if name.startswith("saliency.")
    }
    if held:
        checkpoint.load_tensors(directory, {"saliency": held})
        load_column_ranges(model.model, held)


def load_optimizer(directory: str, model: LossModel, optimizer: torch.optim.Optimizer) -> None:
    """Take over the optimizer's state; the groups' settings stay those of this run."""
    if not any(name.startswith("optimizer.") for name in checkpoint.keys(directory)):
        position = checkpoint.load_state(directory)["position"]
        if position["step"] == position["skipped"]:
            return  # saved before its first real step
        raise UserError(
            f"{directory} holds no optimizer state; set training.resume.load_optimizer_state=false"
        )
    held = _optimizer_state(model, optimizer)
    checkpoint.load_tensors(directory, {"optimizer": checkpoint.tensors_only(held)})
    set_optimizer_state_dict(model.model, optimizer, held, options=_FLAT)


def resume(
    directory: str,
    model: LossModel,
    optimizer: torch.optim.Optimizer,
    flags: Resume,
    say: Callable[[str], None] = print,
) -> tuple[Position, dict[str, Any] | None]:
    """The position to continue from, and the state of the data or None for its beginning."""
    load_model(directory, model, flags.strict_model_load, say)
    if flags.load_optimizer_state:
        load_optimizer(directory, model, optimizer)
    load_saliency(directory, model)
    held = checkpoint.load_state(directory)
    position = Position.from_json(held["position"])
    if not flags.load_training_state:
        position = Position(
            schedule_step=position.schedule_step,
            strength=position.strength,
            initial_strength=position.initial_strength,
        )
    if not flags.load_scheduler_state:
        position.schedule_step = 0
    return position, held["data"] if flags.continues_data else None


def as_json(position: Position, data: dict[str, Any] | None) -> dict[str, Any]:
    """The JSON half of a checkpoint."""
    return {"position": asdict(position), "data": data}

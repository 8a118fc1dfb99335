"""Models in and out of folders: Hugging Face ones, our own, and checkpoints of training.

Weights come from safetensors or from our checkpoints, never from pickles, and no code of a
repository runs. A missing or unexpected weight is an error: nothing stays random silently.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.initialization import no_init_weights
from transformers.utils.hub import cached_file, extract_commit_hash

from bitray import checkpoint, storage
from bitray.models.convert import to_bitnet
from bitray.models.families import family_of
from bitray.models.low_rank import add_corrections
from bitray.models.moe import add_experts, experts_of
from bitray.nn import bit_linears, set_strength
from bitray.scratch import Scratch
from bitray.settings import UserError, nearest

WEIGHTS = "model.safetensors"
MODEL_FILES = "model"
"""Folder of a checkpoint that holds config and tokenizer."""
_ATTENTION = "sdpa"
_OLDER_FIELDS = ("rope_theta", "rope_scaling")
"""What transformers still takes in place of `rope_parameters`."""
_NO_MODEL = (StrictDataclassError, ArithmeticError, LookupError, TypeError)
"""What transformers raises over fields that no model can be made of."""


# ------------------------------------------------------------------------------------------ making


def build_model(config: dict[str, Any]) -> PreTrainedModel:
    """A new model of random fp32 weights from the fields of a transformers config.

    `config` names its `model_type`; a field that this type does not have is a `UserError`.
    """
    fields = dict(config)
    if "model_type" not in fields:
        raise UserError("model config: 'model_type' has to be given, for instance 'llama'")
    kind = fields.pop("model_type")
    try:
        known = AutoConfig.for_model(kind).to_dict()
    except ValueError:
        raise UserError(f"model config: transformers knows no model_type '{kind}'") from None
    strangers = [name for name in fields if name not in {*known, *_OLDER_FIELDS}]
    if strangers:
        raise UserError(
            f"model config: '{strangers[0]}' is no field of {kind}{nearest(strangers[0], known)}"
        )
    try:
        return _from_config(AutoConfig.for_model(kind, **fields))
    except _NO_MODEL as error:
        raise UserError(f"model config: no {kind} can be made of it: {_reason(error)}") from None


def _from_config(config: PretrainedConfig) -> PreTrainedModel:
    family_of(config)
    return AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=_ATTENTION
    )


def skeleton(files_dir: str | Path, revision: str | None = None) -> PreTrainedModel:
    """The module tree that the `config.json` of a folder or of a revision on the Hub describes, its
    weights not yet set."""
    config = _config(str(files_dir), revision)
    with no_init_weights():
        model = _from_config(config)
        ours = getattr(config, "bitray", None)
        if ours is not None:
            if "subln" in ours or "moe" not in ours:
                to_bitnet(model, subln=ours.get("subln"))
            if experts := experts_of(config):
                add_experts(model, experts)
            if "lrc_rank" in ours:
                add_corrections(model, ours["lrc_rank"])
    model.tie_weights()  # a part of the initialisation that was left out
    return model


def commit_of(hub_id: str, revision: str | None = None) -> str:
    """The commit that a revision of a model on the Hub is now."""
    try:
        file = cached_file(hub_id, "config.json", revision=revision)
    except (OSError, ValueError) as error:
        raise UserError(f"{hub_id}: {_why_not(hub_id, error)}") from None
    commit = extract_commit_hash(file, None)
    assert commit is not None, f"{file} lies in no snapshot of the Hub's cache"
    return commit


def _config(folder: str, revision: str | None = None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, revision=revision, trust_remote_code=False)
    except (OSError, ValueError, StrictDataclassError) as error:
        why = f"no usable config.json: {_reason(error)}"
        raise UserError(
            f"{folder}: {why if Path(folder).is_dir() else _why_not(folder, error)}"
        ) from None


def _reason(error: Exception) -> str:
    """Of a strict dataclass the reason that it wraps, which is in its second line."""
    if isinstance(error, StrictDataclassError):
        return str(error).splitlines()[-1].partition("Error: ")[2]
    return _first_line(error)


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n", 1)[0]


# ----------------------------------------------------------------------------------------- loading


def load_model(
    path_or_hub_id: str, revision: str | None = None, dtype: torch.dtype = torch.float32
) -> PreTrainedModel:
    """A model from a Hugging Face folder or hub id, from `save_model`, or from a checkpoint.

    A ternary model comes back at strength 1; its masters stay fp32 whatever `dtype` says, since
    its codes are decided from them.
    """
    with local_model(path_or_hub_id) as folder:
        if folder is None:
            return _from_hugging_face(path_or_hub_id, revision, dtype)
        _check_is_model(path_or_hub_id, folder)
        if checkpoint.is_complete(path_or_hub_id):
            model = skeleton(folder)
            tensors = {"model": model.state_dict()}
            checkpoint.load_tensors(path_or_hub_id, tensors, strict=True)
        elif _is_ours(folder):
            model = skeleton(folder)
            _fill(model, Path(folder) / WEIGHTS)
        else:
            return _from_hugging_face(folder, None, dtype)
    return _cast(model, dtype)


def load_teacher(
    path_or_hub_id: str,
    dtype: torch.dtype,
    device: torch.device | str,
    revision: str | None = None,
) -> PreTrainedModel:
    """A frozen model in evaluation mode."""
    model = load_model(path_or_hub_id, revision, dtype)
    return model.requires_grad_(False).eval().to(device)


def load_tokenizer(path_or_hub_id: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that lies beside a model."""
    with local_model(path_or_hub_id) as folder:
        try:
            return AutoTokenizer.from_pretrained(
                folder or path_or_hub_id, revision=revision, trust_remote_code=False
            )
        except (OSError, ValueError) as error:
            raise UserError(
                f"{path_or_hub_id}: no usable tokenizer: {_first_line(error)}"
            ) from None


@contextmanager
def local_model(path_or_hub_id: str) -> Iterator[str | None]:
    """The local folder with config and tokenizer of what lies at a path; None for a hub id."""
    if not storage.exists(path_or_hub_id):
        if not _may_be_hub_id(path_or_hub_id):
            raise UserError(f"{path_or_hub_id}: no such model folder{_sibling(path_or_hub_id)}")
        yield None
        return
    complete = checkpoint.is_complete(path_or_hub_id)
    if not complete and not storage.is_remote(path_or_hub_id):
        yield storage.local_path(path_or_hub_id)
        return
    with Scratch() as temporary:
        if complete:
            _copy_model_files(path_or_hub_id, Path(temporary))
        else:
            storage.download_tree(path_or_hub_id, temporary)
        yield temporary


def _check_is_model(path: str, folder: str) -> None:
    if not (Path(folder) / "config.json").is_file():
        unfinished = storage.exists(storage.join(path, MODEL_FILES, "config.json"))
        why = "an unfinished checkpoint" if unfinished else "no config.json, so this is not a model"
        raise UserError(f"{path}: {why}")


def _copy_model_files(directory: str, folder: Path) -> None:
    """The small files of a checkpoint, their hashes checked."""
    for name in checkpoint.file_names(directory, f"{MODEL_FILES}/"):
        target = folder / name.removeprefix(f"{MODEL_FILES}/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(checkpoint.read_file(directory, name))


def _may_be_hub_id(name: str) -> bool:
    parts = name.split("/")
    beside = len(parts) == 2 and Path(parts[0]).is_dir()  # so a folder that is not there is meant
    return len(parts) <= 2 and all(parts) and not name.startswith((".", "~")) and not beside


def _sibling(path: str) -> str:
    if storage.is_remote(path):
        return ""
    parent = Path(storage.local_path(path)).parent
    return nearest(Path(path).name, [p.name for p in parent.iterdir()]) if parent.is_dir() else ""


def _is_ours(folder: str) -> bool:
    try:
        return "bitray" in json.loads((Path(folder) / "config.json").read_text())
    except ValueError as error:
        raise UserError(f"{folder}: no usable config.json: {_first_line(error)}") from None


def _from_hugging_face(name: str, revision: str | None, dtype: torch.dtype) -> PreTrainedModel:
    try:
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
        family_of(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            revision=revision,
            config=config,
            dtype=dtype,
            attn_implementation=_ATTENTION,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except UserError:
        raise
    except (OSError, ValueError, SafetensorError, StrictDataclassError) as error:
        raise UserError(f"{name}: {_why_not(name, error)}") from None
    model, found = loaded
    _refuse(name, found["missing_keys"], found["unexpected_keys"])
    return model


def check_weights(path: str) -> None:
    """`UserError` for a local folder whose config might load but whose weights cannot."""
    folder = Path(path)
    if folder.is_dir() and not checkpoint.is_complete(path) and not [*folder.glob("*.safetensors")]:
        raise UserError(f"{path}: {_why_not(path, OSError())}")


def _why_not(name: str, error: Exception) -> str:
    folder = Path(name)
    if folder.is_dir() and not list(folder.glob("*.safetensors")):
        pickled = [*folder.glob("*.bin"), *folder.glob("*.pt"), *folder.glob("*.pth")]
        if pickled:
            return (
                f"its weights are pickled ({pickled[0].name}), which may run code when read; "
                "convert them to safetensors first"
            )
        return "no weights (*.safetensors) in this folder"
    if folder.is_dir():
        return f"cannot be loaded: {_reason(error)}"
    return f"no such folder, and not loaded from the Hugging Face Hub: {_first_line(error)}"


def _fill(model: nn.Module, file: Path) -> None:
    """Copy the tensors of a safetensors file into the model, each name exactly once."""
    if not file.is_file():
        raise UserError(f"{file.parent}: no {file.name}")
    expected = tensors_once(model)
    try:
        held = load_file(file)
    except SafetensorError as error:
        raise UserError(f"{file}: cannot be read: {_first_line(error)}") from None
    _refuse(str(file), set(expected) - set(held), set(held) - set(expected))
    for name, tensor in expected.items():
        if held[name].shape != tensor.shape:
            raise UserError(
                f"{file}: {name} has shape {tuple(held[name].shape)}, the config says "
                f"{tuple(tensor.shape)}"
            )
        tensor.copy_(held[name])


def _refuse(where: str, missing: Iterable[str], unexpected: Iterable[str]) -> None:
    for kind, names in (("missing", sorted(missing)), ("unexpected", sorted(unexpected))):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise UserError(f"{where}: {kind} weights: {', '.join(names[:3])}{more}")


def _cast(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    if dtype != torch.float32:
        masters = {p for layer in bit_linears(model) for p in layer.parameters()}
        for parameter in model.parameters():
            if parameter not in masters:
                parameter.data = parameter.data.to(dtype)
    set_strength(model, 1.0)
    return model


# ------------------------------------------------------------------------------------------ saving


def tensors_once(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, tied tensors under their first name only."""
    seen: set[int] = set()
    once: dict[str, Tensor] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            once[name] = tensor.detach()
    return once


def save_model(
    model: PreTrainedModel, directory: str, tokenizer: PreTrainedTokenizerBase | None = None
) -> None:
    """Write masters (safetensors), config and tokenizer to a folder that `load_model` reads.

    Every worker calls it while the model is sharded. A ternary model's folder is for bitray only;
    use the export for one that others load.
    """
    tensors = {name: _whole(tensor) for name, tensor in tensors_once(model).items()}
    if dist.is_initialized() and dist.get_rank() != 0:
        return
    with Scratch() as temporary:
        for name, content in model_files(model, tokenizer).items():
            beside = name.removeprefix(f"{MODEL_FILES}/")
            storage.write_bytes(storage.join(directory, beside), content)
        save_file(tensors, Path(temporary) / WEIGHTS, metadata={"format": "pt"})
        storage.upload(str(Path(temporary) / WEIGHTS), storage.join(directory, WEIGHTS))


def _whole(tensor: Tensor) -> Tensor:
    tensor = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return tensor.cpu().contiguous()


def model_files(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None = None
) -> dict[str, bytes]:
    """Config (with our section) and tokenizer as checkpoints carry them: `model/NAME` -> bytes."""
    with Scratch() as temporary:
        config = deepcopy(model.config)
        config.architectures = [type(model).__name__]
        config.save_pretrained(temporary)
        if model.can_generate():
            model.generation_config.save_pretrained(temporary)
        if tokenizer is not None:
            tokenizer.save_pretrained(temporary)
        files = sorted(path for path in Path(temporary).rglob("*") if path.is_file())
        return {
            f"{MODEL_FILES}/{path.relative_to(temporary).as_posix()}": path.read_bytes()
            for path in files
        }

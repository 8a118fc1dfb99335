"""Reading checkpoints without trusting them: marker, hashes, and DCP's files so that nothing runs.

DCP (torch.distributed.checkpoint) unpickles `.metadata`, and values that are no tensors, without
limits. Here the pickle meets a named list of classes, each replaced by one that only keeps fields,
and the metadata is built anew from those; shards are loaded with `weights_only=True`, as by DCP.
"""

import hashlib
import io
import pickle
from collections.abc import Callable, Container, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import PurePosixPath
from typing import Annotated, Any, Final, Literal, TypeVar

import torch
from pydantic import AfterValidator, ValidationError
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from bitray import storage
from bitray.settings import Settings, UserError, nearest

COMPLETE = "COMPLETE"
METADATA = ".metadata"
FORMAT: Final = "bitray-checkpoint-1"
_CONNECTIONS = 8

T = TypeVar("T")


# ------------------------------------------------------------------------------ marker and hashes


def relative_name(name: str) -> str:
    """A file name that cannot lead out of the checkpoint it is in."""
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or str(path) != name or name == COMPLETE:
        raise ValueError(f"'{name}' is no file name inside a checkpoint")
    return name


class Entry(Settings):
    """What a file of a checkpoint has to be."""

    sha256: str
    size: int


class Seal(Settings):
    """The content of COMPLETE."""

    format: Literal["bitray-checkpoint-1"] = FORMAT
    files: dict[Annotated[str, AfterValidator(relative_name)], Entry]


def read_seal(directory: str) -> Seal:
    """What COMPLETE says; `UserError` where there is none, or none that this version reads."""
    marker = storage.join(directory, COMPLETE)
    if storage.exists(directory) and not storage.exists(marker):
        raise UserError(f"{directory}: has no {COMPLETE} marker: its save was not finished")
    content = storage.read_bytes(marker)
    try:
        return Seal.model_validate_json(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise UserError(f"{marker}: not a marker of {FORMAT}: {where}: {first['msg']}") from None


def read_checked(directory: str, name: str, seal: Seal) -> bytes:
    """The content of a file, if it is what was written."""
    if name not in seal.files:
        raise UserError(f"{directory}: has no file '{name}'{nearest(name, seal.files)}")
    content = storage.read_bytes(storage.join(directory, name))
    if hashlib.sha256(content).hexdigest() != seal.files[name].sha256:
        raise UserError(f"{directory}: '{name}' does not have the sha256 that {COMPLETE} gives")
    return content


def find_flaw(uri: str, entry: Entry) -> str | None:
    """How a file differs from what was written, after reading all of it."""
    found = storage.info(uri)
    if found is None:
        return f"{uri}: is missing"
    if found.size != entry.size:
        return f"{uri}: has {found.size} bytes instead of {entry.size}"
    if sha256(uri) != entry.sha256:
        return f"{uri}: does not have the sha256 that {COMPLETE} gives"
    return None


def parallel(work: Callable[[Any], T], items: Iterable[Any]) -> list[T]:
    """`work` on each item, in threads: hashing and transfers both leave the interpreter free."""
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(work, items))


def sha256(uri: str) -> str:
    """The hash of a file's content, in hex."""
    with storage.open_input(uri) as source:
        return hashlib.file_digest(source, "sha256").hexdigest()


# --------------------------------------------------------------------------------- DCP's own files


class SafeReader(FileSystemReader):
    """DCP's reader, which finds the files in the local folder `stage`.

    Of a remote checkpoint it fetches the files that the rank at hand needs; it checks their hashes.
    """

    def __init__(self, directory: str, stage: str) -> None:
        super().__init__(stage)
        self._directory, self._stage = directory, stage
        self._seal = read_seal(directory)
        self.metadata = read_metadata(directory, self._seal)

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self.metadata

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Load what this rank's plan needs, from no more files than that takes."""
        places = [self.storage_data[item.storage_index] for item in plan.items]
        for flaw in parallel(self._bring, sorted({place.relative_path for place in places})):
            if flaw is not None:
                raise UserError(flaw)
        return super().read_data(plan, planner)

    def _bring(self, name: str) -> str | None:
        local = storage.join(self._stage, name)
        if storage.is_remote(self._directory):
            storage.download_tree(storage.join(self._directory, name), local)
        return find_flaw(local, self._seal.files[name])


def read_metadata(directory: str, seal: Seal) -> Metadata:
    """What tensors a checkpoint has, and where in its files they lie."""
    content = read_checked(directory, METADATA, seal)
    return parse_metadata(content, seal.files, storage.join(directory, METADATA))


def parse_metadata(content: bytes, files: Container[str], origin: str = ".metadata") -> Metadata:
    """The metadata in `.metadata`, whose tensors may lie in `files` only, without storage_meta.

    Raises `UserError` for a name that DCP's own metadata do not use, for objects other than
    tensors, and for what is no metadata at all.
    """
    try:
        fields = _Unpickler(io.BytesIO(content)).load().state
        paths = fields["planner_data"]
        return Metadata(
            {key: _tensor(key, one.state) for key, one in fields["state_dict_metadata"].items()},
            planner_data={key: paths[key] for key in fields["state_dict_metadata"]},
            storage_data=dict(_place(i, at, files) for i, at in fields["storage_data"].items()),
        )
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error
    except Exception as error:  # a damaged pickle can raise anything: it is reported, not hidden
        raise UserError(f"{origin}: is no metadata of DCP ({error!r})") from error


class _Fields:
    """Stands for a class of DCP while it is read: keeps the fields, and has nothing that acts."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


# All that torch 2.11 to 2.13 write, `StorageMeta` with its pathlib classes excepted.
_ALLOWED: Mapping[tuple[str, str], type] = {
    ("torch.distributed.checkpoint.metadata", "Metadata"): _Fields,
    ("torch.distributed.checkpoint.metadata", "MetadataIndex"): _Fields,
    ("torch.distributed.checkpoint.metadata", "TensorStorageMetadata"): _Fields,
    ("torch.distributed.checkpoint.metadata", "BytesStorageMetadata"): _Fields,
    ("torch.distributed.checkpoint.metadata", "ChunkStorageMetadata"): _Fields,
    ("torch.distributed.checkpoint.metadata", "TensorProperties"): _Fields,
    ("torch.distributed.checkpoint.metadata", "_MEM_FORMAT_ENCODING"): int,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _Fields,
    ("torch", "Size"): tuple,
    ("torch.serialization", "_get_layout"): str,
}


class _Unpickler(pickle.Unpickler):
    """Gives for each name that DCP writes something that can neither act nor be altered."""

    def find_class(self, module: str, name: str) -> Any:
        dtype = vars(torch).get(name) if module == "torch" else None
        if isinstance(dtype, torch.dtype):
            return dtype
        if (module, name) not in _ALLOWED:
            raise UserError(f"names '{module}.{name}', which no checkpoint needs: it is not opened")
        return _ALLOWED[module, name]


def _tensor(key: str, fields: Any) -> TensorStorageMetadata:
    if fields is None:  # BytesStorageMetadata, whose content DCP would unpickle
        raise UserError(f"has a pickled object as '{key}', where only tensors are read")
    chunks = [
        ChunkStorageMetadata(torch.Size(one.state["offsets"]), torch.Size(one.state["sizes"]))
        for one in fields["chunks"]
    ]
    dtype = fields["properties"].state[0]
    return TensorStorageMetadata(TensorProperties(dtype), torch.Size(fields["size"]), chunks)


def _place(
    index: _Fields, place: _Fields, files: Container[str]
) -> tuple[MetadataIndex, _StorageInfo]:
    what, where = index.state, place.state
    if where["relative_path"] not in files:
        raise UserError(f"names a file '{where['relative_path']}' that does not belong to it")
    info = _StorageInfo(where["relative_path"], int(where["offset"]), int(where["length"]))
    return MetadataIndex(what["fqn"], what.get("offset"), what.get("index")), info

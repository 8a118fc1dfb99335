"""Checkpoints: their layout, marker and hashes, and the scan for the newest whole one.

    step_000500/  __0_0.distcp ...  .metadata  state.json  model/...  COMPLETE

COMPLETE is written last and holds the sha256 of every other file: a checkpoint without it does not
count, and a file that disagrees with it is not used. Tensors go through DCP
(torch.distributed.checkpoint) and load on any number of ranks; state is JSON; nothing that is read
can run code (see `safe_reader`). A `Saver` writes beside training. When to save is decided in
`training`.
"""

import json
import pickle
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future as Pending
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from bitray import storage
from bitray.retries import failing
from bitray.safe_reader import (
    COMPLETE,
    METADATA,
    Entry,
    SafeReader,
    Seal,
    find_flaw,
    parallel,
    read_checked,
    read_metadata,
    read_seal,
    relative_name,
    sha256,
)
from bitray.scratch import Scratch
from bitray.settings import UserError, nearest

STATE = "state.json"
LOOK_S = 0.2
"""How often `Saver.ready` looks at the health of storage."""
_STEP = re.compile(r"^step_(\d+)$")
_OURS = re.compile(r"^(COMPLETE|state\.json|model|\.metadata(\.tmp)?|.*\.distcp|\..*\.tmp)$")

T = TypeVar("T")
Told = Callable[[str, str], None]
"""Takes the directory and the reason of what is passed over."""


# ----------------------------------------------------------------------------------------- saving


def save(
    directory: str,
    tensors: dict[str, Any],
    state: Mapping[str, Any],
    files: Mapping[str, bytes] = MappingProxyType({}),
    *,
    permit: Callable[[], None] = lambda: None,
    group: ProcessGroup | None = None,
) -> None:
    """Write a checkpoint; collective over `group`, else over the default process group, if any.

    `tensors` is a nested dict whose leaves are Tensors or DTensors, `state` is JSON-able, `files`
    are small files such as "model/config.json"; rank 0's `state` and `files` count. What an earlier
    try left in `directory` is removed first. A remote directory is staged in a temporary folder of
    each rank. Rank 0 asks `permit`, which may raise, before anything goes and before COMPLETE is
    written. When one rank fails, all raise, and there is no COMPLETE.
    """

    def prepare() -> dict[str, bytes]:
        flatten(tensors)
        if _rank() != 0:
            return {}
        text = json.dumps(state, indent=1)
        small = {STATE: text.encode(), **{relative_name(k): data for k, data in files.items()}}
        permit()
        _clear(directory, files)
        return small

    def complete() -> None:
        if _rank() == 0:
            permit()
            _complete(directory, written)

    small = _together(prepare, group)
    with _stage(directory) as stage:
        with _dcp_errors(directory):
            writer, alone = _Writer(stage), not _distributed()
            dcp.save(tensors, storage_writer=writer, process_group=group, no_dist=alone)
        mine = _together(lambda: _publish(stage, directory, small), group)
    written = _gather(mine, group)
    _together(complete, group)


class Saver:
    """Saves checkpoints in a thread, so that training waits for a copy of the tensors alone.

    One save is under way at a time; what went wrong with it is raised by the next call, on all
    ranks. The thread has a process group of its own, since its collectives run beside training's.
    Every rank makes one and makes the same calls.

    `dcp.async_save` would end with the tensors' files. What makes them count comes after: hashes,
    uploads, the lease, the marker, the removal of older ones, each agreed on by all ranks. So all
    of `save` runs in our thread, and of torch's only the staging is taken.
    """

    def __init__(self, permit: Callable[[], None] = lambda: None) -> None:
        self._permit = permit
        self._group = dist.new_group(backend="gloo") if _distributed() else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Pending[None] | None = None
        pinned = torch.cuda.is_available()
        self._stager = DefaultStager(StagingOptions(pinned, False, False, pinned))

    def save(
        self,
        directory: str,
        tensors: dict[str, Any],
        state: Mapping[str, Any],
        files: Mapping[str, bytes] = MappingProxyType({}),
        *,
        before: Callable[[], None] = lambda: None,
        after: Callable[[], None] = lambda: None,
    ) -> None:
        """Begin a save; rank 0 calls `before` in the thread, and `after` once it is complete. Waits
        for the save before this one, and raises what went wrong with it."""
        self.wait()
        flatten(tensors)
        copies: Any = self._stager.stage(tensors)

        def on_rank_zero(work: Callable[[], None]) -> None:
            _together(lambda: work() if _rank() == 0 else None, self._group)

        def write() -> None:
            on_rank_zero(before)
            save(directory, copies, state, files, permit=self._permit, group=self._group)
            on_rank_zero(after)

        self._pending = self._thread.submit(write)

    def ready(self) -> bool:
        """Whether a save would begin at once, after a wait as long as storage answers on all ranks;
        False where some rank's thread is trying a call again."""
        while self._pending is not None:
            with suppress(TimeoutError):
                self._pending.exception(timeout=LOOK_S)
            if any(_gather(not self._pending.done() and failing() is not None)):
                return False
            if all(_gather(self._pending.done())):
                break
        return True

    def wait(self) -> None:
        """Until nothing is under way; raises what went wrong."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def close(self) -> None:
        """Let the thread go, without waiting for what is under way."""
        self._thread.shutdown(wait=False)
        self._stager.close()


def flatten(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, torch.Tensor]:
    """The leaves of a nested dict by dotted key, as `keys` names them; all have to be tensors."""
    flat: dict[str, torch.Tensor] = {}
    for key, value in tensors.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, f"{prefix}{key}.")
        elif isinstance(value, torch.Tensor):
            flat[f"{prefix}{key}"] = value
        else:
            raise TypeError(f"'{prefix}{key}' is a {type(value).__name__}: only tensors are saved")
    return flat


def tensors_only(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A nested dict without what is no tensor, such as an optimizer's `param_groups`.

    The tensors are the same objects, so loading into the result fills `tree`.
    """
    return {
        key: tensors_only(value) if isinstance(value, Mapping) else value
        for key, value in tree.items()
        if isinstance(value, Mapping | torch.Tensor)
    }


class _Writer(dcp.FileSystemWriter):
    """DCP's writer, less the record of where it wrote, which is nobody's business later."""

    def storage_meta(self) -> StorageMeta | None:
        return None

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        try:
            return super().write_data(plan, planner)
        except RuntimeError as error:
            # On a full disk torch.save fails again while it closes its file, and says only that.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


@contextmanager
def _stage(directory: str) -> Iterator[str]:
    """Where this rank writes: the directory itself, or a temporary folder to upload from."""
    if not storage.is_remote(directory):
        yield storage.local_path(directory)
        return
    with Scratch() as folder:
        yield folder


def _clear(directory: str, files: Iterable[str]) -> None:
    """Remove an earlier try, but no folder in which something else lies."""
    if not storage.exists(directory):
        return
    root, tops = storage.absolute(directory), {name.split("/")[0] for name in files}
    for one in storage.list_files(directory):
        name = one.uri.removeprefix(root).strip("/").split("/")[0]
        if name not in tops and not _OURS.match(name):
            raise UserError(f"{directory}: holds '{name}', so no checkpoint is written over it")
    _discard(directory)


def _discard(directory: str) -> None:
    """Remove a checkpoint, its COMPLETE first, so that no half of it ever counts."""
    storage.remove(storage.join(directory, COMPLETE))
    storage.remove(directory)


def _publish(stage: str, directory: str, small: Mapping[str, bytes]) -> dict[str, Entry]:
    """Hash the files that this rank wrote into `stage`, and bring them to where they belong."""
    names = [path.name for path in Path(stage).glob(f"__{_rank()}_*.distcp")]
    for name, data in small.items():
        storage.write_bytes(storage.join(stage, name), data)
    if _rank() == 0:
        names += [METADATA, *small]

    def bring(name: str) -> Entry:
        source = storage.join(stage, name)
        found = storage.info(source)
        assert found is not None, f"{source} was not written"
        if storage.is_remote(directory):
            storage.upload(source, storage.join(directory, name))
        return Entry(sha256=sha256(source), size=found.size)

    entries = dict(zip(names, parallel(bring, names), strict=True))
    storage.sync_folder(stage)
    storage.sync_folder(Path(stage).parent)
    return entries


def _complete(directory: str, written: list[dict[str, Entry]]) -> None:
    """Set the marker, once all that the ranks say they wrote is seen from here."""
    entries = {name: entry for one in written for name, entry in one.items()}
    for name, entry in entries.items():
        found = storage.info(storage.join(directory, name))
        if found is None or found.size != entry.size:
            raise UserError(
                f"{directory}: '{name}', which another rank wrote, is not visible from rank 0; "
                "the directory has to be on storage that all machines share"
            )
    storage.write_json(storage.join(directory, COMPLETE), Seal(files=entries).model_dump())


# ---------------------------------------------------------------------------------------- loading


def load_tensors(directory: str, tensors: dict[str, Any], strict: bool = True) -> None:
    """Fill the tensors of a nested dict in place, resharding as needed; collective as `save` is.

    Only the files that hold what this rank needs are fetched, and their hashes checked. Raises
    `UserError` for a tensor that the checkpoint does not have or has in another shape, and, if
    `strict`, for one that it has beside these under the same top-level key.
    """

    with _stage(directory) as stage, _dcp_errors(directory):

        def open_() -> SafeReader:
            reader = SafeReader(directory, stage)
            _fits(directory, reader.metadata, tensors, strict)
            return reader

        reader = _together(open_)
        dcp.load(dict(tensors), storage_reader=reader, no_dist=not _distributed())


def load_state(directory: str) -> dict[str, Any]:
    """The JSON state that was given to `save`."""
    try:
        return json.loads(read_file(directory, STATE))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{storage.join(directory, STATE)}: is not JSON: {error}") from None


def read_file(directory: str, name: str) -> bytes:
    """One of the small files, its hash checked."""
    return read_checked(directory, name, read_seal(directory))


def file_names(directory: str, prefix: str = "") -> list[str]:
    """The names of the files of a complete checkpoint, such as those that begin with "model/"."""
    return sorted(name for name in read_seal(directory).files if name.startswith(prefix))


def keys(directory: str) -> dict[str, tuple[int, ...]]:
    """The dotted key and shape of each tensor in a checkpoint."""
    found = read_metadata(directory, read_seal(directory)).state_dict_metadata
    return {key: tuple(one.size) for key, one in found.items()}  # type: ignore[union-attr]


def _fits(directory: str, metadata: Metadata, tensors: Mapping[str, Any], strict: bool) -> None:
    wanted, found = flatten(tensors), metadata.state_dict_metadata
    missing = [key for key in wanted if key not in found]
    if missing:
        hint = nearest(missing[0], found)
        count = f" ({len(missing)} of {len(wanted)} are missing)" if len(missing) > 1 else ""
        raise UserError(f"{directory}: has no tensor '{missing[0]}'{hint}{count}")
    for key, tensor in wanted.items():
        assert not tensor.is_meta, f"'{key}' is on the meta device: there is nothing to fill"
        there, here = list(found[key].size), list(tensor.shape)  # type: ignore[union-attr]
        if there != here:
            raise UserError(f"{directory}: '{key}' has shape {there}, where {here} is wanted")
    tops = {key: path[0] for key, path in metadata.planner_data.items()}
    extra = [key for key in found if key not in wanted and tops[key] in tensors]
    if strict and extra:
        count = f" ({len(extra)} such tensors)" if len(extra) > 1 else ""
        raise UserError(f"{directory}: also holds '{extra[0]}', which nothing here takes{count}")


# ------------------------------------------------------------------------------- which one is whole


def step_directory(root: str, step: int) -> str:
    """Where the checkpoint of a step lies under `root`."""
    return storage.join(root, f"step_{step:06d}")


def is_complete(directory: str) -> bool:
    """Whether the marker is there: cheap, and blind to damage (see `verify`)."""
    return storage.exists(storage.join(directory, COMPLETE))


def verify(directory: str) -> str | None:
    """Why a checkpoint cannot be used, after reading and hashing all of it; None if it can."""
    try:
        files = read_seal(directory).files
    except UserError as error:
        return str(error)
    flaws = parallel(lambda one: find_flaw(storage.join(directory, one[0]), one[1]), files.items())
    return next((flaw for flaw in flaws if flaw), None)


def warn(directory: str, reason: str) -> None:
    """Say that a checkpoint cannot be used."""
    warnings.warn(f"{reason}; looking for an earlier checkpoint", stacklevel=3)


def newest_complete(root: str, told: Told = warn) -> str | None:
    """The newest step under `root` that verifies; of those passed over somebody is `told`."""
    for directory in _steps(root):
        problem = verify(directory)
        if problem is None:
            return directory
        told(directory, problem)
    return None


def retain(root: str, keep_last: int) -> list[str]:
    """Remove all but the newest `keep_last` steps, and the unfinished ones before them.

    Nothing goes unless a newer one verifies; `best` and `final` stay. Call it on one rank only.
    Returns what was removed.
    """
    assert keep_last >= 1
    newest, steps = newest_complete(root), _steps(root)
    older = steps[steps.index(newest) + 1 :] if newest else []
    kept = [one for one in older if is_complete(one)][: keep_last - 1]
    gone = [one for one in older if one not in kept]
    for directory in gone:
        _discard(directory)
    return gone


def _steps(root: str) -> list[str]:
    """The directories of steps, the newest first."""
    names = [(_STEP.match(one.rpartition("/")[2]), one) for one in storage.list_dirs(root)]
    steps = sorted((int(match[1]), one) for match, one in names if match)
    return [one for _, one in reversed(steps)]


# ------------------------------------------------------------------------------------- inner parts


def _distributed() -> bool:
    return dist.is_available() and dist.is_initialized()


def _rank() -> int:
    return dist.get_rank() if _distributed() else 0


def _gather(value: Any, group: ProcessGroup | None = None) -> list[Any]:
    """The value of each rank, in their order, on all ranks."""
    if not _distributed():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def _together(work: Callable[[], T], group: ProcessGroup | None = None) -> T:
    """Run `work` on each rank and wait for the others; when one fails, all raise."""
    try:
        result = work()
    except Exception as error:
        number = error.errno if isinstance(error, OSError) else None
        _gather((f"{error}", isinstance(error, UserError), number), group)
        raise
    for rank, sentence in enumerate(_gather(None, group)):
        if sentence is not None:
            text, by_user, number = sentence
            told = f"on rank {rank}: {text}"
            if number is not None:
                raise OSError(number, told)
            raise UserError(text) if by_user else RuntimeError(told)
    return result


@contextmanager
def _dcp_errors(directory: str) -> Iterator[None]:
    """What went wrong on a rank, in place of DCP's wrapper of it, which is no `Exception`."""
    try:
        with warnings.catch_warnings():
            # Without a process group DCP says that it assumes a single process, as it should.
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as error:
        cause = next(iter(error.failures.values()))[0]
        if isinstance(cause, pickle.UnpicklingError):
            cause = UserError(f"{directory}: a shard holds more than tensors: it is not opened")
        raise cause from error

"""The ticket stream: one long-lived Ray Data pipeline per stage feeds `TorchTrainer`'s workers.

    controller, at every start of the workers    ticket_dataset(...)() -> Opened
    rank 0 asks for its shard                    TicketConfig.configure(Opened, W) -> W splits
    reader tasks (2 x 0.25 CPU)                  MixtureActor.plan -> Shards.read -> bundles
    every worker                                 worker_batches(shard, ...) -> (ticket, Batch)

A *bundle* is g tickets of one worker: one block of one row, because the cost of a stream is by
block. Bundle i is the `i // W`-th of worker `i % W`. Readers are generators over many bundles.
"""

import functools
import itertools
import queue
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.data import (
    Datasource,
    ExecutionOptions,
    ExecutionResources,
    ReadTask,
    TaskPoolStrategy,
)
from ray.data.block import BlockMetadata
from ray.exceptions import RayTaskError
from ray.train import DataConfig

from bitray.data.manifest import read_manifest
from bitray.data.mixture import StageMixture
from bitray.data.packing import PackedRows
from bitray.data.plan import Rows
from bitray.data.reader import empty_batch, read_rows
from bitray.data.shards import Shards
from bitray.data.tickets import EMPTY, ENDED, Deal
from bitray.retries import PATIENCE_S, patient
from bitray.settings import UserError

if TYPE_CHECKING:
    from bitray.models.batch import Batch

TASKS = 1000
"""Reader tasks of a stage, at most: Ray Data holds all of them from the start."""
TASK_BUNDLES = 64
"""Bundles of a reader task, at least: a start costs tens of ms, a lost task all of its reads."""


class DataEnded(Exception):
    """No more rows will come. All workers meet it at the same step."""


@dataclass(frozen=True)
class TicketStream:
    """One stage's stream: which mixture, which prepared rows, and what it may use."""

    name: str
    """Of the stage, at the mixture actor and among the trainer's datasets."""
    mixture: StageMixture
    prepared: str
    """Folder of prepared rows."""
    actor: str
    """Name of the `MixtureActor`."""
    readers: int = 2
    reader_cpus: float = 0.25
    labels: dict[str, str] = field(default_factory=dict)
    """Of the nodes that readers may be on."""
    patience: float = PATIENCE_S
    """Seconds that readers wait for storage which does not answer."""
    object_store_bytes: int = 64 << 20
    """Bounds how far reading runs ahead; pool sizes and prefetching do not."""


@dataclass(frozen=True)
class Opened:
    """A stream from a step on, for one generation of workers."""

    stream: TicketStream
    generation: int
    first_step: int

    def bundles(self, deal: Deal) -> int:
        """Bundles of all workers together, from the first step to the stage's end."""
        left = (self.stream.mixture.steps - self.first_step) * deal.micro_batches
        return -(-left // self.stream.mixture.bundle) * deal.world_size

    def bundle(self, deal: Deal, number: int) -> "Bundle":
        """The tickets of one bundle, and the step of each."""
        turn, rank = divmod(number, deal.world_size)
        size = self.stream.mixture.bundle
        first = self.first_step * deal.micro_batches + turn * size
        end = self.stream.mixture.steps * deal.micro_batches
        positions = range(first, min(first + size, end))
        return Bundle(
            [deal.ticket(rank, at) for at in positions],
            [at // deal.micro_batches for at in positions],
        )


class Bundle(NamedTuple):
    """Tickets that travel together, `EMPTY` ones too."""

    tickets: list[int]
    steps: list[int]

    def until(self, last_step: int) -> list[int]:
        """The tickets, with `ENDED` for those of later steps."""
        pairs = zip(self.tickets, self.steps, strict=True)
        return [ticket if step < last_step else ENDED for ticket, step in pairs]


def ticket_dataset(
    stream: TicketStream, state: Callable[[], Mapping[str, Any] | None]
) -> Callable[[], Any]:
    """What to give `TorchTrainer(datasets={stream.name: ...}, dataset_config=TicketConfig())`.

    The trainer calls it at every start of its workers; `state` then has to find the data state of
    the newest complete checkpoint of the stage, or None to begin at its start.
    """
    return functools.partial(_open, stream, state)


def _open(stream: TicketStream, state: Callable[[], Mapping[str, Any] | None]) -> Opened:
    found = state()
    actor = ray.get_actor(stream.actor)
    generation: Any = ray.get(actor.open.remote(stream.name, stream.mixture, found))
    return Opened(stream, generation, found["step"] if found else 0)


class TicketConfig(DataConfig):
    """Builds the pipelines when the number of workers is known.

    The stock class replaces a dataset's own options, and with them the order.
    """

    def configure(  # type: ignore[override]
        self, datasets: Mapping[str, Opened], world_size: int, *_: Any, **__: Any
    ) -> list[dict[str, Any]]:
        """Per rank, the iterators over its bundles, by name of the stage."""
        ranks: list[dict[str, Any]] = [{} for _ in range(world_size)]
        for name, opened in datasets.items():
            # `equal=True` would cut the last bundles; unequal, a block goes to the rank that has
            # had the fewest rows: in turn, as every block is one row.
            splits = _dataset(opened, world_size).streaming_split(world_size, equal=False)
            for rank, split in zip(ranks, splits, strict=True):
                rank[name] = split
        return ranks


def _dataset(opened: Opened, world_size: int) -> ray.data.Dataset:
    stream = opened.stream
    source = _Bundles(opened, Deal(stream.mixture.tickets_per_step, world_size))
    dataset = ray.data.read_datasource(
        source,
        override_num_blocks=len(source.ranges),
        compute=TaskPoolStrategy(size=min(stream.readers, len(source.ranges))),
        num_cpus=stream.reader_cpus,
    )
    dataset.set_name(stream.name)
    dataset.context.execution_options = ExecutionOptions(
        preserve_order=True,
        resource_limits=ExecutionResources(object_store_memory=stream.object_store_bytes),
        label_selector=stream.labels or None,
    )
    # Each bundle is handed on as soon as it is read, as a block of its own; collecting them into
    # larger blocks would hold back tickets that a worker needs to reach the next decision.
    dataset.context.target_max_block_size = 1
    dataset.context.enable_progress_bars = False
    return dataset


class _Bundles(Datasource):
    """Bundles in order, a range of them to each reader task."""

    def __init__(self, opened: Opened, deal: Deal) -> None:
        super().__init__()
        self._opened, self._deal = opened, deal
        count = opened.bundles(deal)
        size = max(TASK_BUNDLES, -(-count // TASKS))
        # A stage that is complete has one task, which has nothing to do.
        self.ranges = [range(at, min(at + size, count)) for at in range(0, max(count, 1), size)]

    def estimate_inmemory_data_size(self) -> int | None:
        """Unknown to Ray Data, which would otherwise guess at a number of blocks."""
        return None

    def get_read_tasks(
        self, parallelism: int, per_task_row_limit: int | None = None, data_context: Any = None
    ) -> list[Any]:
        """The reader tasks, in order."""
        return [
            ReadTask(
                functools.partial(_read_bundles, self._opened, self._deal, numbers),
                BlockMetadata(
                    num_rows=len(numbers), size_bytes=None, input_files=None, exec_stats=None
                ),
            )
            for numbers in self.ranges
        ]


# ----------------------------------------------------------------------------------- in a reader


def _read_bundles(opened: Opened, deal: Deal, numbers: range) -> Iterator[pa.Table]:
    """As patiently as the run asks for."""
    with patient(opened.stream.patience):
        yield from _bundles(opened, deal, numbers)


def _bundles(opened: Opened, deal: Deal, numbers: range) -> Iterator[pa.Table]:
    """Plan and read bundles; the plan of the next one is asked for while one is read."""
    stream = opened.stream
    actor = ray.get_actor(stream.actor)
    shards = _shards(stream.prepared, stream.mixture.manifest)
    size = stream.mixture.tickets_per_step

    def ask(bundle: Bundle) -> Any:
        real = [ticket for ticket in bundle.tickets if ticket != EMPTY]
        until = (bundle.steps[-1] + 1) * size
        return actor.plan.remote(stream.name, opened.generation, real, until=until)

    bundles = [opened.bundle(deal, number) for number in numbers]
    answer: Any = ask(bundles[0]) if bundles else None
    for bundle, following in itertools.zip_longest(bundles, bundles[1:]):
        planned: Any = ray.get(answer)
        while planned is None:
            planned = ray.get(ask(bundle))
        answer = ask(following) if following else None
        tickets = bundle.tickets
        if "end" in planned:
            tickets = bundle.until(int(planned["end"]) // size)
        yield _bundle(shards, list(stream.mixture.sizes), tickets, planned)


@functools.lru_cache(maxsize=4)
def _shards(prepared: str, identity: str) -> Shards:
    """The rows, opened once per process."""
    manifest = read_manifest(prepared)
    if manifest is None or manifest.identity() != identity:
        raise UserError(f"{prepared}: these are not the prepared rows that the run began with")
    return Shards(prepared, manifest)


def _bundle(
    shards: Shards, sources: list[str], tickets: list[int], planned: Mapping[str, np.ndarray]
) -> pa.Table:
    """One block of one row: tickets, and of the rows of the tickets that are not empty, one after
    the other, source numbers, token ids, and lengths of documents and of their prompts, with the
    number of documents per row."""
    found, source = PackedRows(np.empty((0, 0), np.int32), [], []), np.empty(0, np.int64)
    if planned["row"].size:
        rows = Rows(*(planned[key].reshape(-1) for key in Rows._fields))
        found, source = read_rows(shards, sources, rows), rows.source
    columns: dict[str, np.ndarray] = {
        "tickets": np.array(tickets, np.int64),
        "source": source,
        "input_ids": found.input_ids.reshape(-1),
        "documents": np.array([len(lengths) for lengths in found.lengths], np.int64),
        "lengths": np.fromiter(itertools.chain(*found.lengths), np.int32),
        "prompts": np.fromiter(itertools.chain(*found.prompts), np.int32),
    }
    return pa.table({name: _cell(values) for name, values in columns.items()})


def _cell(values: np.ndarray) -> pa.ListArray:
    """An array as the one value of a column."""
    return pa.ListArray.from_arrays(pa.array([0, len(values)], pa.int32()), pa.array(values))


# ----------------------------------------------------------------------------------- in a worker


def worker_batches(
    shard: ray.data.DataIterator,
    mixture: StageMixture,
    rank: int,
    world_size: int,
    start_ticket: int = 0,
    *,
    ahead: int = 4,
) -> "Prefetched":
    """`(ticket, batch)` of one worker from a ticket that begins a step on, to the stage's end.

    Each step has `Deal.micro_batches` of them, empty ones with ticket -1 included. `shard` is what
    `ray.train.get_dataset_shard(stage)` gives; all workers have to begin at about the same time.
    Reading begins at once, in a thread that stays at most `ahead` batches ahead.
    """
    step, rest = divmod(start_ticket, mixture.tickets_per_step)
    assert rest == 0, f"ticket {start_ticket} does not begin a step"
    deal = Deal(mixture.tickets_per_step, world_size)
    positions = range(step * deal.micro_batches, mixture.steps * deal.micro_batches)
    wanted = (deal.ticket(rank, position) for position in positions)
    return Prefetched(_expected(_delivered(shard, mixture), wanted), ahead)


def _expected(
    delivered: Iterator[tuple[int, "Batch"]], wanted: Iterator[int]
) -> Iterator[tuple[int, "Batch"]]:
    """What is delivered, which has to be just what is wanted: no ticket lost, none twice."""
    for ticket, found in itertools.zip_longest(wanted, delivered):
        if found is None or found[0] != ticket:
            got = "the end of the stream" if found is None else f"ticket {found[0]}"
            raise RuntimeError(f"data stream: {got} came where ticket {ticket} was due")
        yield found


def _delivered(
    shard: ray.data.DataIterator, mixture: StageMixture
) -> Iterator[tuple[int, "Batch"]]:
    # Prefetching would hold back each block until the next one is there, which may wait for a
    # decision that needs this one; the thread of `Prefetched` runs ahead without that.
    whole: Any = None  # a batch is a block; Ray's annotation forgets that
    blocks: Any = shard.iter_batches(batch_size=whole, batch_format="pyarrow", prefetch_batches=0)
    try:
        for block in blocks:
            yield from _batches(block, mixture)
    except RayTaskError as error:
        if isinstance(said := _root(error), UserError):
            raise said from None
        raise


def _root(error: BaseException) -> BaseException:
    """What a reader raised, without the accounts of the tasks that it has come through."""
    return _root(error.cause) if isinstance(error, RayTaskError) else error


def _batches(block: pa.Table, mixture: StageMixture) -> Iterator[tuple[int, "Batch"]]:
    """The micro-batches of a bundle."""
    columns = {
        name: block.column(name).combine_chunks().values.to_numpy() for name in block.column_names
    }
    size, length = mixture.rows_per_ticket, mixture.length
    ids = columns["input_ids"].reshape(-1, size, length)
    source = columns["source"].reshape(-1, size)
    ends = np.cumsum(columns["documents"])[:-1]
    lengths, prompts = (
        [part.tolist() for part in np.split(columns[name], ends)] for name in ("lengths", "prompts")
    )
    at = 0
    for ticket in columns["tickets"].tolist():
        if ticket == EMPTY:
            yield ticket, empty_batch(size, length)
            continue
        if ticket == ENDED:
            raise DataEnded("no more rows are prepared than were trained on")
        mine = slice(at * size, (at + 1) * size)
        batch = PackedRows(ids[at], lengths[mine], prompts[mine]).batch(source[at].tolist())
        yield ticket, batch
        at += 1


class Prefetched:
    """An iterator that a thread fills ahead of whoever reads it; `close` it if you stop early."""

    def __init__(self, items: Iterator[tuple[int, "Batch"]], ahead: int) -> None:
        self._ready: queue.Queue[Any] = queue.Queue(maxsize=max(1, ahead))
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._fill, args=(items,), daemon=True)
        self._thread.start()

    def __iter__(self) -> "Prefetched":
        return self

    def __next__(self) -> tuple[int, "Batch"]:
        item = self._ready.get()
        if isinstance(item, BaseException):
            self._ready.put(item)
            raise item
        return item

    def close(self) -> None:
        """Stop reading ahead."""
        self._closed.set()

    def _fill(self, items: Iterator[tuple[int, "Batch"]]) -> None:
        try:
            for item in items:
                self._put(item)
                if self._closed.is_set():
                    break
            self._put(StopIteration())
        except BaseException as error:
            self._put(error)

    def _put(self, item: Any) -> None:
        while not self._closed.is_set():
            try:
                return self._ready.put(item, timeout=0.5)
            except queue.Full:
                continue

"""How fast rows come, against Hugging Face `datasets` with a `DataLoader`; how little is padding.

Both sides start from the same tokenised documents and deliver micro-batches of padded tensors; real
tokens are counted, padding is not. Ours are packed rows in the order of the plan: read in this
process, and through Ray Data as training gets them. Theirs is `interleave_datasets` over parquet, a
document a row, padded to the longest of its batch; of its formats and numbers of workers the best
counts. All take turns, so that a busy machine is busy for all; medians are compared.

  python scripts/bench_loader.py --check
  python scripts/bench_loader.py --data /data/mine --repeats 7
"""

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch.utils.data import DataLoader

from bitray import Config
from bitray.data.actor import mixture_actor
from bitray.data.job import plan_job
from bitray.data.manifest import Manifest
from bitray.data.mixture import Mixture, StageMixture
from bitray.data.packing import pack
from bitray.data.plan import MixturePlan, SourceSize, opening
from bitray.data.plan import _quotas as known_quotas
from bitray.data.preparation import run_job
from bitray.data.prepare import prepare
from bitray.data.reader import PlanReader
from bitray.data.shards import Shards
from bitray.data.stream import TicketConfig, TicketStream, ticket_dataset, worker_batches
from bitray.data.tokenizer import Encoder, backend_json, end_token_id, train_tokenizer
from bitray.data.units import documents, in_process
from bitray.models.batch import IGNORED, Batch
from bitray.pipeline.report import Table
from bitray.pipeline.run import run
from bitray.pipeline.session import ray_session
from bitray.pipeline.streams import BUNDLE, LEAD

LENGTH = 1024
"""Of Stage 2's preset."""
ROWS = 8
"""Of a micro-batch; theirs has as many documents as make up the same number of tokens."""
TICKETS = 4
"""Micro-batches of a step."""
DEPTHS = (10, 1_000, 1_000_000)


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    tickets: int = 800
    repeats: int = 5
    steps: int = 150
    generated: int = 20_000


QUICK = Size(tickets=40, repeats=1, steps=20, generated=20_000)


@dataclass(frozen=True)
class Figure:
    """One line of the table, and the bar it has to meet if there is one."""

    name: str
    value: str
    bar: str = ""
    holds: bool = True


# ------------------------------------------------------------------------------------ both sides


class Corpus:
    """Sources, prepared once in this process and once on Ray."""

    def __init__(self, config: Config, folder: Path) -> None:
        assert config.model.config is not None
        self.data, self.folder = config.data, folder
        self.tokenizer = train_tokenizer(
            documents(self.data, max_bytes=2_000_000), config.model.config["vocab_size"]
        )
        self.encoder = Encoder(backend_json(self.tokenizer), end_token_id(self.tokenizer))
        self.alone_seconds, self.manifest = timed(self._prepare_alone)
        self.shards = Shards(str(folder / "alone"), self.manifest)

    def _prepare_alone(self) -> Manifest:
        job = plan_job(self.data, self.tokenizer, LENGTH, str(self.folder / "alone"))
        return run_job(job, in_process)

    def prepare_on_ray(self) -> Manifest:
        path = str(self.folder / "tokenizer")
        self.tokenizer.save_pretrained(path)
        Path(path, "config.json").write_text('{"model_type": "llama"}')
        return prepare(self.data, path, LENGTH, str(self.folder / "ray"))

    @property
    def tokens(self) -> int:
        found = self.manifest.sources.values()
        return sum(each.tokens for source in found for each in source.splits.values())

    @property
    def sizes(self) -> dict[str, SourceSize]:
        return {
            name: SourceSize(source.splits["train"].rows, source.splits["train"].tokens)
            for name, source in self.manifest.sources.items()
        }

    def texts(self, source: str) -> Iterator[str]:
        alone = {"sources": {source: self.data.sources[source]}}
        return documents(self.data.model_copy(update=alone))

    def pieces(self, source: str) -> Iterator[np.ndarray]:
        """The documents of the prepared rows, as they were cut."""
        rows = np.arange(self.manifest.num_rows(source))
        for ids, lengths, _ in zip(*self.shards.read(source, "train", rows), strict=True):
            yield from np.split(ids[: sum(lengths)], np.cumsum(lengths)[:-1])

    def mixture(self, steps: int) -> StageMixture:
        return StageMixture(
            seed=0,
            manifest=self.manifest.identity(),
            sizes=self.sizes,
            weights=self.data.shares(),
            length=LENGTH,
            steps=steps,
            rows_per_ticket=ROWS,
            tickets_per_step=TICKETS,
            bundle=min(BUNDLE, LEAD // 2 * TICKETS),
            lead=LEAD,
        )


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def rate(batches: Iterator[int], count: int) -> float:
    """Real tokens a second, once things are under way."""
    for _ in range(max(4, count // 10)):
        next(batches)
    seconds, tokens = timed(lambda: sum(itertools.islice(batches, count)))
    return tokens / seconds


# ------------------------------------------------------------------------------------ theirs


def parquet(corpus: Corpus) -> list[datasets.Dataset]:
    """The tokenised documents of every source, as `datasets` likes them."""
    found = []
    for name in corpus.manifest.sources:
        path = corpus.folder / f"{name}.parquet"
        pq.write_table(pa.table({"input_ids": list(corpus.pieces(name))}), path)
        cache = str(corpus.folder / "cache")
        found.append(datasets.Dataset.from_parquet(str(path), cache_dir=cache))
    return found


def padded(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """The usual collate: ids, labels and mask, as wide as the longest."""
    ids = [torch.as_tensor(row["input_ids"]) for row in rows]
    width = max(map(len, ids))
    batch = torch.zeros(len(ids), width, dtype=torch.int64)
    mask = torch.zeros_like(batch)
    for at, one in enumerate(ids):
        batch[at, : len(one)] = one
        mask[at, : len(one)] = 1
    labels = batch.masked_fill(mask == 0, IGNORED)
    return {"input_ids": batch, "labels": labels, "attention_mask": mask}


def theirs(
    sources: list[datasets.Dataset], shares: list[float], kind: str | None, workers: int
) -> Iterator[int]:
    """Real tokens of batch after batch. Shares are of tokens, as in ours; theirs, of documents."""
    sizes = [np.mean(pc.list_value_length(each.data.column("input_ids"))) for each in sources]
    wanted = np.array(shares) / sizes
    probabilities = wanted / wanted.sum()
    mixed = datasets.interleave_datasets(
        sources, probabilities=probabilities.tolist(), seed=0, stopping_strategy="all_exhausted"
    ).with_format(kind)
    count = round(ROWS * LENGTH / float(probabilities @ sizes))
    kept = {"persistent_workers": True, "prefetch_factor": 8} if workers else {}
    loader = DataLoader(mixed, count, collate_fn=padded, num_workers=workers, **kept)
    while True:
        for batch in loader:
            yield int(batch["attention_mask"].sum())


# ------------------------------------------------------------------------------------ ours


def real_tokens(batches: Iterator[tuple[int, Batch]]) -> Iterator[int]:
    for _, batch in batches:
        yield int(batch.real.sum())


def in_this_process(corpus: Corpus) -> Iterator[int]:
    plan = MixturePlan(0, corpus.sizes, [opening(corpus.sizes, corpus.data.shares())])
    return real_tokens(PlanReader(plan, corpus.shards, ROWS, tickets_per_step=TICKETS).batches())


class Streams:
    """Streams through Ray Data to this process; every opening is a new generation."""

    def __init__(self, corpus: Corpus) -> None:
        self.corpus, self.name = corpus, f"bench-{corpus.folder.name}"
        self.actor = mixture_actor(self.name, str(corpus.folder / "mixture"))

    def open(self, steps: int, step: int = 0, state: Any = None) -> Iterator[int]:
        mixture = self.corpus.mixture(steps)
        stream = TicketStream("bench", mixture, str(self.corpus.folder / "alone"), self.name)
        opened = ticket_dataset(stream, lambda: state)()
        (shard,) = TicketConfig().configure({"bench": opened}, 1)
        batches = worker_batches(shard["bench"], mixture, 0, 1, step * TICKETS)
        try:
            yield from real_tokens(batches)
        finally:
            batches.close()


def state_at(mixture: StageMixture, step: int) -> dict[str, Any] | None:
    """The data state of a checkpoint at a step, with a new weighting every 5000 steps before."""
    held = Mixture.opened(mixture, 1, None)
    for at in range(5000, step, 5000):
        held.decide(at, mixture.weights)
    return held.state(step) if step else None


# ------------------------------------------------------------------------------------ figures


def speed(corpus: Corpus, streams: Streams, size: Size) -> Iterator[Figure]:
    """Real tokens a second of every way, in turns."""
    sources, shares = parquet(corpus), list(corpus.data.shares().values())
    ways: dict[str, Callable[[], Iterator[int]]] = {
        f"Hugging Face, {kind or 'lists'}, {workers} workers": partial(
            theirs, sources, shares, kind, workers
        )
        for kind in (None, "numpy", "torch")
        for workers in (0, 1, 2)
    }
    ours = {
        "ours, in one process": partial(in_this_process, corpus),
        "ours, Ray Data stream": partial(streams.open, size.tickets // 2 + 100),
    }
    rates: dict[str, list[float]] = {name: [] for name in [*ways, *ours]}
    for _ in range(size.repeats):
        for name, way in (ways | ours).items():
            rates[name].append(rate(way(), size.tickets))
    medians = {name: statistics.median(found) for name, found in rates.items()}
    best = max(ways, key=lambda name: medians[name])
    for name in [best, *ours]:
        yield Figure(f"{name}, tokens/s", f"{medians[name]:,.0f}")
    for name in ours:
        pairs = zip(rates[name], rates[best], strict=True)
        ratio = statistics.median(mine / other for mine, other in pairs)
        yield Figure(f"{name} / best of Hugging Face", f"{ratio:.1f}", ">= 3", ratio >= 3)


def preparing(corpus: Corpus) -> Iterator[Figure]:
    """Text to rows, tokenising included."""
    seconds, _ = timed(corpus.prepare_on_ray)
    alone = corpus.tokens / corpus.alone_seconds
    yield Figure("prepare in one process, tokens/s", f"{alone:,.0f}")
    yield Figure("prepare on Ray with its start, tokens/s", f"{corpus.tokens / seconds:,.0f}")


def resuming(corpus: Corpus, streams: Streams) -> Iterator[Figure]:
    """From the state of a checkpoint to the first batch: no dearer where it is far."""
    alone: dict[int, float] = {}
    ray: dict[int, list[float]] = {}
    mixture = corpus.mixture(2 * max(DEPTHS))
    for step in DEPTHS:
        alone[step] = statistics.median(
            timed(first_batch(corpus, mixture, step))[0] for _ in range(5)
        )
    for _, step in itertools.product(range(3), DEPTHS):
        opened = streams.open(mixture.steps, step, state_at(mixture, step))
        ray.setdefault(step, []).append(timed(partial(next, opened))[0])
    for step in DEPTHS:
        yield Figure(f"resume at step {step:,}, in one process, ms", f"{1000 * alone[step]:.1f}")
        seconds = statistics.median(ray[step])
        holds = seconds <= min(5.0, 1.5 * statistics.median(ray[DEPTHS[0]]))
        bar = f"<= 5 s, 1.5 x at {DEPTHS[0]}"
        yield Figure(f"resume at step {step:,}, Ray Data stream, s", f"{seconds:.2f}", bar, holds)


def first_batch(corpus: Corpus, mixture: StageMixture, step: int) -> Callable[[], Any]:
    """What a worker without Ray does when it resumes, nothing of it done before."""
    state = state_at(mixture, step)
    assert state is not None

    def resume() -> None:
        known_quotas.cache_clear()
        plan = Mixture.opened(mixture, 1, state).plan
        reader = PlanReader(plan, corpus.shards, ROWS, tickets_per_step=TICKETS)
        next(reader.batches(step * TICKETS))

    return resume


def waiting(folder: Path, size: Size) -> Iterator[Figure]:
    """Share of a step that the demo model waits for data, in a run through the pipeline."""
    words = [
        f"output_dir={folder}", "experiment=bench", "training=stage0_pretrain",
        f"stages.stage0.max_steps={size.steps}", "training.batch_size=4",
        "training.gradient_accumulation_steps=2", "training.max_seq_length=256",
        "training.log_every=10", "training.save_every=100000", "training.eval_every=100000",
        "evaluation.rows=8", "report.prompts=[]", "logging.tensorboard=false",
    ]  # fmt: skip
    run(Config.load(overrides=words))
    lines = map(json.loads, (folder / "bench" / "metrics.jsonl").read_text().splitlines())
    _, *shares = [line["train/data_wait"] for line in lines if "train/data_wait" in line]
    share = statistics.median(shares)
    yield Figure("data wait of a step of the demo model", f"{share:.2%}", "< 1 %", share < 0.01)


# ------------------------------------------------------------------------------------ padding


def offline(sizes: list[int], length: int) -> int:
    """Rows of best fit decreasing, over all documents at once."""
    rows, room = sum(size // length for size in sizes), []  # type: tuple[int, list[int]]
    for size in sorted(filter(None, (size % length for size in sizes)), reverse=True):
        best = bisect_left(room, size)
        rows += best == len(room)
        insort(room, (room.pop(best) if best < len(room) else length) - size)
    return rows


def padding(sizes: list[int], length: int, rows: int) -> float:
    return 1 - sum(sizes) / (rows * length)


def packing(corpus: Corpus, size: Size) -> Iterator[Figure]:
    """Padding of every source against packing offline, and of the whole."""
    sizes = {
        name: [len(ids) for ids in corpus.encoder.encode(list(corpus.texts(name)))]
        for name in corpus.data.sources
    }
    draw = random.Random(0)
    generated = [int(draw.lognormvariate(6, 1.1)) + 1 for _ in range(size.generated)]
    for length in (512, 2048):
        rows = {name: packed(found, length) for name, found in sizes.items()}
        for name, found in sizes.items():
            mine = padding(found, length, rows[name])
            best = padding(found, length, offline(found, length))
            value = f"{mine:.2%} (offline {best:.2%})"
            yield Figure(
                f"padding of {name} at {length}", value, "offline + 1.5 %", mine <= best + 0.015
            )
        everything = [n for found in sizes.values() for n in found]
        share = padding(everything, length, sum(rows.values()))
        name = f"padding of all sources at {length}"
        yield Figure(name, f"{share:.2%}", "<= 1.5 %", share <= 0.015)
        share = padding(generated, length, packed(generated, length))
        name = f"padding of {size.generated:,} generated documents at {length}"
        yield Figure(name, f"{share:.2%}", "< 0.5 %", share < 0.005)


def packed(sizes: list[int], length: int) -> int:
    return sum(1 for _ in pack((np.zeros(size, np.int32) for size in sizes), length))


# ------------------------------------------------------------------------------------ all of it


def figures(config: Config, size: Size, folder: Path) -> Iterator[Figure]:
    corpus = Corpus(config, folder)
    yield from packing(corpus, size)
    with ray_session():
        streams = Streams(corpus)
        yield from speed(corpus, streams, size)
        yield from resuming(corpus, streams)
        yield from preparing(corpus)
        yield from waiting(folder, size)


def configured(data: str | None) -> Config:
    """The demo, on the embedded corpus or on a folder, each folder in it a source."""
    if data is None:
        return Config.load()
    folders = [path for path in sorted(Path(data).resolve().iterdir()) if path.is_dir()]
    sources = [f"data.sources.{p.name}.path={p}" for p in folders or [Path(data).resolve()]]
    return Config.load(overrides=["data=local", *sources])


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--data", help="folder of text, each folder in it a source")
    parser.add_argument("--repeats", type=int, default=Size.repeats)
    parser.add_argument("--quick", action="store_true", help="whether it runs at all")
    parser.add_argument("--check", action="store_true", help="fail if a bar is missed")
    said = parser.parse_args()
    size = QUICK if said.quick else Size(repeats=said.repeats)
    torch.set_num_threads(1)
    datasets.disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="br") as folder:
        found = list(figures(configured(said.data), size, Path(folder)))
    rows = [(f.name, f.value, f.bar, "" if f.holds else "MISSED") for f in found]
    print(Table(("figure", "value", "bar", ""), rows).text())
    return int(said.check and not all(figure.holds for figure in found))


if __name__ == "__main__":
    sys.exit(main())

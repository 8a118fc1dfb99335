"""What the stages work on: a tokenizer, and rows prepared for every length that a run needs."""

import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from bitray import storage
from bitray.data import prepare
from bitray.data.job import Job, Pinned, inputs_of, plan_job
from bitray.data.manifest import Manifest, digest
from bitray.data.overlap import overlap
from bitray.data.preparation import Preparation
from bitray.data.settings import DataSettings
from bitray.data.sources import ASIDE
from bitray.data.tokenizer import train_tokenizer
from bitray.data.units import documents
from bitray.models.loading import commit_of, load_tokenizer, local_model
from bitray.pipeline.config import Config
from bitray.pipeline.groups import RowKind
from bitray.pipeline.identity import FILE
from bitray.scratch import Scratch
from bitray.settings import UserError
from bitray.storage import FileInfo

TOKENIZER_BYTES = 10_000_000
"""Text of each source that a tokenizer is trained on, at most."""

PINNED = "hub.json"
"""File of a run with its inputs on the Hub."""


def prepared_root(config: Config) -> str:
    """Where prepared rows and trained tokenizers lie, for all runs of an output folder."""
    return config.data.prepared_dir or storage.join(config.output_dir, "prepared")


def named_tokenizer(config: Config) -> str | None:
    """Id or folder of the tokenizer, or None if one is to be trained on the data."""
    return config.model.tokenizer or config.model.path


def at_commit(config: Config) -> Config:
    """The configuration with its pretrained model at a commit, where that lies on the Hub: of the
    revision that was said, else the one with which the run began, else the newest."""
    model = config.model
    if model.path is None:
        return config
    if not storage.exists(model.path):
        with local_model(model.path):  # `UserError` for what can only be a folder
            commit = commit_of(model.path, model.revision or _commit_of_run(config))
        return config.override({"model.revision": commit})
    if model.revision is not None:
        raise UserError(
            f"model.revision: {model.revision}, but {model.path} is a folder, which has no "
            "revisions; leave it out, or give the id of a model on the Hub"
        )
    return config


def _commit_of_run(config: Config) -> str | None:
    uri = storage.join(config.run_dir, FILE)
    if config.resume.fresh or not storage.exists(uri):
        return None
    there: dict[str, str | None] = storage.read_json(uri)["settings"]["model"]
    return there["revision"] if there["path"] == config.model.path else None


def pinned(run_dir: str) -> dict[str, list[FileInfo]]:
    """The inputs on the Hub with which a run began."""
    uri = storage.join(run_dir, PINNED)
    held = storage.read_json(uri) if storage.exists(uri) else {}
    return {name: [FileInfo(*one) for one in files] for name, files in held.items()}


def pin(run_dir: str, inputs: Pinned) -> None:
    """Have a run go on with these, whatever is pushed by then and whether the Hub answers."""
    if inputs:
        storage.write_json(storage.join(run_dir, PINNED), {**pinned(run_dir), **inputs})


def inputs_on_hub(config: Config) -> dict[str, Sequence[FileInfo]]:
    """Those with which the run began, else those of now. `UserError` for inputs, wherever they
    are, that are not there."""
    inputs = inputs_of(config.data, {} if config.resume.fresh else pinned(config.run_dir))
    return {source.hub: inputs[name] for name, source in config.data.sources.items() if source.hub}


def _tokenizer_of(config: Config, on_hub: Pinned) -> str:
    """Id or folder of the tokenizer; trains one of the model's own vocabulary where none is named,
    once for the same data."""
    named = named_tokenizer(config)
    if named is not None:
        return named
    assert config.model.config is not None
    size, inputs = config.model.config.get("vocab_size", 32000), inputs_of(config.data, on_hub)
    sources = {
        name: [source.model_dump(mode="json", exclude=ASIDE), [list(one) for one in inputs[name]]]
        for name, source in config.data.sources.items()
    }
    key = digest([size, config.data.split.model_dump(), sources])
    folder = storage.join(prepared_root(config), f"tokenizer-{key[:16]}")
    if not storage.exists(storage.join(folder, "tokenizer.json")):
        print(f"tokenizer: training {size} tokens", flush=True)
        with Scratch() as temporary:
            texts = documents(config.data, max_bytes=TOKENIZER_BYTES, pinned=on_hub)
            train_tokenizer(texts, size).save_pretrained(temporary)
            # its main file last: where that is, the tokenizer is whole
            files = sorted(Path(temporary).iterdir(), key=lambda p: p.name == "tokenizer.json")
            for path in files:
                storage.write_bytes(storage.join(folder, path.name), path.read_bytes())
    return folder


def rooted(job: Job, folder: str) -> Job:
    """The job whose rows lie below this folder, under a name of their own."""
    return replace(job, root_uri=storage.join(folder, job.identity[:16]))


class Material:
    """A tokenizer, and prepared rows by kind. Identities are known before they are prepared."""

    def __init__(self, config: Config) -> None:
        self.config, self.on_hub = config, inputs_on_hub(config)
        self.tokenizer = _tokenizer_of(config, self.on_hub)
        """Its id or folder."""
        self.kinds = sorted({RowKind.of(stage) for stage in config.stages.values()})
        self.jobs = {kind: self._job(kind) for kind in self.kinds}

    def load_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer itself."""
        return load_tokenizer(self.tokenizer, self.config.model.revision_of(self.tokenizer))

    @property
    def folders(self) -> dict[RowKind, str]:
        """Where the rows of each kind lie."""
        return {kind: job.root_uri for kind, job in self.jobs.items()}

    @cached_property
    def _preparations(self) -> dict[RowKind, Preparation]:
        return {kind: Preparation(job) for kind, job in self.jobs.items()}

    @property
    def known(self) -> dict[RowKind, Manifest]:
        """What may be known of the rows of each kind by now, once they are opened."""
        return {kind: each.manifest for kind, each in self._preparations.items() if each.manifest}

    def open(self) -> dict[RowKind, Manifest]:
        """Prepare what training begins with, as Ray Data jobs on all CPUs."""
        for each in self._preparations.values():
            each.open(partial(prepare.on_ray, labels=self.config.scaling.data_labels))
        return self.known

    def rest(self, reserved: float = 0.0) -> Generator[bool]:
        """Prepare all the rest, in the order of the stages, leaving so many CPUs alone; after every
        unit, whether more is known. Then say what near-duplicates there are, if that is wanted."""
        labels = self.config.scaling.data_labels
        work = partial(prepare.on_ray, reserved=reserved, labels=labels)
        for kind in dict.fromkeys(RowKind.of(stage) for stage in self.config.stages.values()):
            yield from self._preparations[kind].rest(work)
        if self.config.data.overlap.enabled:
            longest = max(self.kinds)  # it cuts the fewest documents
            found = self.folders[longest], self.known[longest]
            print(overlap(*found, self.config.data.overlap).text(), flush=True)

    def prepare(self) -> dict[RowKind, Manifest]:
        """Prepare everything."""
        self.open()
        for _ in self.rest():
            pass
        return self.known

    def _job(self, kind: RowKind) -> Job:
        data = self._data(kind)
        job = plan_job(data, self.load_tokenizer(), kind.length, "", self.on_hub)
        return rooted(job, prepared_root(self.config))

    def _data(self, kind: RowKind) -> DataSettings:
        return self.config.data.model_copy(update={} if kind.packed else {"open_bins": 0})


@contextmanager
def prepared_beside(
    material: Material,
    reserved: float,
    tell: Callable[[Mapping[RowKind, Manifest]], None],
    stop: Callable[[], None],
    asked: Callable[[], bool],
) -> Iterator[list[BaseException]]:
    """Inside, a thread prepares the rest on the CPUs that are not `reserved`, and `tell`s what is
    known. Where it cannot go on, it notes why in the list that is given, and calls `stop`; so it
    does when `asked` to stop."""
    errors: list[BaseException] = []
    over = threading.Event()

    def rest() -> None:
        try:
            with closing(material.rest(reserved)) as units:
                for more in units:
                    if more:
                        tell(material.known)
                    if over.is_set() or asked():
                        break
        except BaseException as error:
            errors.append(error)
        if not all(manifest.done for manifest in material.known.values()) and not over.is_set():
            stop()

    thread = threading.Thread(target=rest, name="prepare")
    thread.start()
    try:
        yield errors
    finally:
        over.set()
        thread.join()

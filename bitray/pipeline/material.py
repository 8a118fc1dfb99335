"""What the stages work on: a tokenizer, and rows prepared for every length that a run needs."""

import tempfile
from pathlib import Path
from typing import NamedTuple

from bitray import storage
from bitray.data.job import inputs_of
from bitray.data.manifest import Manifest, digest
from bitray.data.overlap import overlap
from bitray.data.prepare import prepare, prepared_identity
from bitray.data.settings import DataSettings
from bitray.data.sources import ASIDE
from bitray.data.tokenizer import train_tokenizer
from bitray.data.units import documents
from bitray.pipeline.config import Config, StageSettings

TOKENIZER_BYTES = 10_000_000
"""Text of each source that a tokenizer is trained on, at most."""


def prepared_root(config: Config) -> str:
    """Where prepared rows and trained tokenizers lie, for all runs of an output folder."""
    return config.data.prepared_dir or storage.join(config.output_dir, "prepared")


def named_tokenizer(config: Config) -> str | None:
    """Id or folder of the tokenizer, or None if one is to be trained on the data."""
    return config.model.tokenizer or config.model.path


def tokenizer_of(config: Config) -> str:
    """Id or folder of the tokenizer; trains one of the model's own vocabulary where none is named,
    once for the same data."""
    named = named_tokenizer(config)
    if named is not None:
        return named
    assert config.model.config is not None
    size, inputs = config.model.config.get("vocab_size", 32000), inputs_of(config.data)
    sources = {
        name: [source.model_dump(mode="json", exclude=ASIDE), [list(one) for one in inputs[name]]]
        for name, source in config.data.sources.items()
    }
    key = digest([size, config.data.split.model_dump(), sources])
    folder = storage.join(prepared_root(config), f"tokenizer-{key[:16]}")
    if not storage.exists(storage.join(folder, "tokenizer.json")):
        print(f"tokenizer: training {size} tokens", flush=True)
        with tempfile.TemporaryDirectory() as temporary:
            texts = documents(config.data, max_bytes=TOKENIZER_BYTES)
            train_tokenizer(texts, size).save_pretrained(temporary)
            # its main file last: where that is, the tokenizer is whole
            files = sorted(Path(temporary).iterdir(), key=lambda p: p.name == "tokenizer.json")
            for path in files:
                storage.write_bytes(storage.join(folder, path.name), path.read_bytes())
    return folder


class RowKind(NamedTuple):
    """What a stage wants of its rows. The greatest of a run's kinds is the one it evaluates on."""

    length: int
    packed: bool

    @classmethod
    def of(cls, stage: StageSettings) -> "RowKind":
        """The rows of a stage."""
        return cls(stage.max_seq_length, stage.packing.enabled)

    def __str__(self) -> str:
        return f"{self.length}{'' if self.packed else ', one document a row'}"


class Material:
    """Prepared rows by kind. Identities are known before anything is prepared."""

    def __init__(self, config: Config, tokenizer: str) -> None:
        self.config, self.tokenizer = config, tokenizer
        self.kinds = sorted({RowKind.of(stage) for stage in config.stages.values()})
        self.identities = {
            kind: prepared_identity(self._data(kind), tokenizer, kind.length) for kind in self.kinds
        }

    @property
    def folders(self) -> dict[RowKind, str]:
        """Where the rows of each kind lie."""
        root = prepared_root(self.config)
        return {kind: storage.join(root, key[:16]) for kind, key in self.identities.items()}

    def prepare(self) -> dict[RowKind, Manifest]:
        """Prepare what is missing, as Ray Data jobs."""
        manifests = {
            kind: prepare(self._data(kind), self.tokenizer, kind.length, folder)
            for kind, folder in self.folders.items()
        }
        if self.config.data.overlap.enabled:
            longest = max(self.kinds)  # it cuts the fewest documents
            report = overlap(self.folders[longest], manifests[longest], self.config.data.overlap)
            print(report.text(), flush=True)
        return manifests

    def _data(self, kind: RowKind) -> DataSettings:
        return self.config.data.model_copy(update={} if kind.packed else {"open_bins": 0})

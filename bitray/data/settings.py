"""Settings of the data: sources and their weights, held-out shares, how preparation works."""

import re

from pydantic import Field, field_validator, model_validator

from bitray.data.permutation import WINDOW
from bitray.data.sources import Source
from bitray.settings import Settings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class HeldOut(Settings):
    """Shares of documents kept out of training, by hash of their text: probes and validation."""

    probe: float = Field(0.02, ge=0, lt=1)
    validation: float = Field(0.02, ge=0, lt=1)

    @model_validator(mode="after")
    def _something_left(self) -> "HeldOut":
        if self.probe + self.validation >= 1:
            raise ValueError(
                f"probe and validation ({self.probe} + {self.validation}) leave no training data"
            )
        return self


class OverlapSettings(Settings):
    """Whether and how to look for near-duplicates; no row changes by it."""

    enabled: bool = False
    threshold: float = Field(0.7, gt=0, lt=1)
    """Share of n-grams in common, of all in either, that makes two documents near-duplicates."""
    ngram: int = Field(5, ge=1)
    """Words."""
    max_documents: int = Field(20_000, ge=1)
    """Of each source and split, about; where there are more, evenly spread rows are compared."""
    examples: int = Field(5, ge=0)
    """Pairs to show, of each kind."""


class DataSettings(Settings):
    """What to train on."""

    sources: dict[str, Source]
    """By name; the order numbers them."""
    split: HeldOut = HeldOut()
    seed: int = 0
    """Of the order of rows; what is held out does not depend on it."""
    max_epochs: int | None = Field(None, ge=1)
    """Times that a source may be gone through; then its weight moves to the others. None: no limit;
    a source may have its own."""
    open_bins: int = Field(32, ge=0, le=4096)
    """Rows that packing keeps open; 0: one document a row (see `training.packing.enabled`)."""
    max_bad_rows: float = Field(0.001, ge=0, le=1)
    """Share of a source's rows that may be unreadable, and at least one row; 0: none."""
    max_bad_files: int = Field(0, ge=0)
    """Files of a source that may be damaged or gone when they are read: 0, the first one stops the
    job; else as many are skipped from the damage on, each of which is told and recorded."""
    unit_bytes: int = Field(64 << 20, ge=1)
    """Input that one task prepares. Part of the result: units do not share rows."""
    window: int = Field(WINDOW, ge=1)
    """Rows of a source that are shuffled among themselves in its first epoch; training may begin
    when every source has its first window."""
    overlap: OverlapSettings = OverlapSettings()
    prepared_dir: str | None = None
    """Where prepared rows are kept; None: beside the run."""

    @field_validator("sources")
    @classmethod
    def _plain_names(cls, sources: dict[str, Source]) -> dict[str, Source]:
        if not sources:
            raise ValueError(
                "no source of text is named; give data.sources.NAME.path=FOLDER_FILE_OR_GLOB"
            )
        for name in sources:
            if not _NAME.fullmatch(name):
                raise ValueError(
                    f"'{name}' cannot name a source: letters, digits, '_', '-' and '.' can"
                )
        return sources

    @model_validator(mode="after")
    def _weights_mean_something(self) -> "DataSettings":
        if not sum(source.weight for source in self.sources.values()) > 0:
            raise ValueError("the weights of all sources are 0, so there is nothing to train on")
        return self

    def epochs(self) -> dict[str, int]:
        """Times that the sources which have a limit may be gone through."""
        limits = {
            name: source.max_epochs or self.max_epochs for name, source in self.sources.items()
        }
        return {name: limit for name, limit in limits.items() if limit}

    def shares(self) -> dict[str, float]:
        """Token shares, summing to 1: the weights relative to each other."""
        total = sum(source.weight for source in self.sources.values())
        return {name: source.weight / total for name, source in self.sources.items()}

    def remixed(self) -> tuple[str, ...]:
        """Sources that are trained on; those of weight 0 only lend their held-out documents."""
        return tuple(name for name, source in self.sources.items() if source.weight > 0)

    def probe_domains(self) -> dict[str, list[str]]:
        """Held-out domains, and the sources whose documents they hold."""
        domains: dict[str, list[str]] = {}
        for name, source in self.sources.items():
            domains.setdefault(source.probe or name, []).append(name)
        return domains

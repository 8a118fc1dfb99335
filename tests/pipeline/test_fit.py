"""What the stream of a stage is told: the same order of rows, however many workers there are."""

from collections.abc import Callable

import pytest

from bitray import Config
from bitray.data.manifest import SPLITS, Counts, Manifest, SourceManifest
from bitray.data.tickets import least_lead
from bitray.pipeline.fit import BUNDLE, stage_mixture


def manifest(config: Config) -> Manifest:
    splits = {split: Counts(documents=9, tokens=900, rows=20) for split in SPLITS}
    return Manifest(
        job="x", length=64, group_rows=4, tokenizer="t", vocab_size=9, eos_token_id=0,
        made_from={}, sources={name: SourceManifest(splits=splits) for name in config.data.sources},
    )  # fmt: skip


@pytest.mark.parametrize("tickets", [1, 3, 8])
def test_only_the_size_of_bundles_depends_on_the_number_of_workers(
    tickets: int, configured: Callable[..., Config]
) -> None:
    """Decisions lead by the same number of steps, and no worker waits for itself."""
    found = []
    for workers in range(1, 9):
        said = (f"scaling.num_workers={workers}", f"training.gradient_accumulation_steps={tickets}")
        config = configured("any", *said)
        mixture = stage_mixture(config, "stage2", manifest(config))
        assert mixture.lead >= least_lead(mixture.bundle, workers, tickets)
        values = mixture.to_json()
        assert 1 <= values.pop("bundle") <= BUNDLE and values.pop("max_workers") == workers
        found.append(values)
    assert all(values == found[0] for values in found)

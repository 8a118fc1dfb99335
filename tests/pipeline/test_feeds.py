"""When a worker opens the streams of its stages. What streams give is tested in tests/data."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_streams import flows_of

from bitray import Config, checkpoint
from bitray.pipeline.feeds import Feeds
from bitray.pipeline.folders import StageFolder

pytestmark = pytest.mark.usefixtures("unchecked")  # an empty shard is none of Ray's
STAGES = ("stage0", "stage1", "stage1_9", "stage2")


class Shard:
    """Nothing is in it."""

    def iter_batches(self, **_: Any) -> Iterator[Any]:
        return iter(())


def feeding(tmp_path: Path) -> tuple[Config, Feeds, list[str]]:
    config = Config.load(overrides=[f"output_dir={tmp_path}"])
    opened: list[str] = []

    def shard_of(stage: str) -> Shard:
        opened.append(stage)
        return Shard()

    shards: Callable[[str], Any] = shard_of
    return config, Feeds(config, STAGES, flows_of(tmp_path), 1, shards), opened


def test_the_next_stream_opens_once_the_stage_before_is_read(tmp_path: Path) -> None:
    """Stage 1 converts, takes no steps and has none; nothing comes after stage 2."""
    _, feeds, opened = feeding(tmp_path)
    feeds.of("stage0", 0)
    assert opened == ["stage0"]
    feeds.open_next("stage0")
    assert opened == ["stage0", "stage1_9"]
    feeds.of("stage1_9", 0)
    assert opened == ["stage0", "stage1_9"], "it is open already"
    feeds.open_next("stage1_9")
    feeds.of("stage2", 0)
    feeds.open_next("stage2")
    assert opened == ["stage0", "stage1_9", "stage2"]


def test_the_stream_of_a_stage_that_is_complete_stays_closed(tmp_path: Path) -> None:
    config, feeds, opened = feeding(tmp_path)
    checkpoint.save(StageFolder(config.run_dir, "stage1_9").final, {}, {"data": None}, {})
    feeds.open_next("stage0")
    assert opened == []

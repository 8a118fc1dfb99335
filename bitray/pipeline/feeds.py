"""What the stages of one worker are fed with: the stream of each opens before the stage before it
has ended, so that its pipeline starts while that one is evaluated and saved and a model is loaded.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import ray.train
from ray.data import DataIterator

from bitray.data.stream import Prefetched, TicketStream, worker_batches
from bitray.pipeline.config import Config
from bitray.pipeline.folders import StageFolder
from bitray.pipeline.streams import data_state
from bitray.training.parallel import from_rank_zero, world


class Feeds:
    """The streams of a group of stages. Every worker asks for the same at the same places."""

    def __init__(
        self,
        config: Config,
        stages: Sequence[str],
        streams: Mapping[str, TicketStream],
        epoch: int,
        shard_of: Callable[[str], DataIterator] = ray.train.get_dataset_shard,
    ) -> None:
        self.config, self.streams = config, streams
        self.epoch, self.shard_of = epoch, shard_of
        self.names = [name for name in stages if name in streams]
        self._opened: dict[str, Prefetched] = {}

    def of(self, stage: str, step: int) -> Prefetched:
        """The batches of a stage from a step on."""
        return self._opened.pop(stage, None) or self._open(stage, step)

    def open_next(self, stage: str) -> None:
        """Begin to read for the stage after this one, of which all is read: readers of both at a
        time could take the CPUs that the others wait for, on a cluster that has no more of them."""
        for following in self.names[self.names.index(stage) + 1 :][:1]:
            step = from_rank_zero(partial(self._place, following))
            if step is not None:
                self._opened[following] = self._open(following, step)

    def _place(self, stage: str) -> int | None:
        """The step that a stage goes on from; None if it is complete."""
        if StageFolder(self.config.run_dir, stage).complete:
            return None
        state = data_state(self.config, stage, self.epoch)
        return state["step"] if state else 0

    def _open(self, stage: str, step: int) -> Prefetched:
        mixture = self.streams[stage].mixture
        return worker_batches(
            self.shard_of(stage), mixture, *world(), step * mixture.tickets_per_step
        )

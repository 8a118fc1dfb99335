"""What a worker does where it cannot go on: it hangs, or its memory is not enough."""

import os
import threading
from dataclasses import dataclass, field
from typing import Any

import torch

from bitray import storage
from bitray.pipeline.console import Say
from bitray.training.parallel import world
from bitray.training.watch import place, stacks

OUT_OF_MEMORY = "out_of_memory.json"
"""What a worker leaves that ran out of memory: started again, it would do so again."""
TELLING_SECONDS = 5.0


@dataclass(frozen=True)
class Hung:
    """What a `Watchdog` of this thread calls: it tells where the worker is, and ends it, so that
    all workers start again from the last checkpoint."""

    run_dir: str
    stage: str
    say: Say
    thread: int = field(default_factory=threading.get_ident)

    def __call__(self, seconds: float, median: float) -> None:
        uri = storage.join(self.run_dir, "stacks", f"{self.stage}_worker_{world()[0]}.txt")
        text = (
            f"{self.stage:<9} worker {world()[0]}: no step for {seconds:.0f} s, the median is "
            f"{median:.2g} s; {place(self.thread)}; stacks in {uri}; the workers are started again"
        )

        def tell() -> None:
            self.say(text)
            storage.write_text(uri, stacks())

        telling = threading.Thread(target=tell, daemon=True)
        telling.start()
        telling.join(TELLING_SECONDS)  # it may be the network that hangs
        os._exit(1)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or this machine had no more memory; torch's CPU allocator has no class."""
    kinds = (torch.OutOfMemoryError, MemoryError)
    return isinstance(error, kinds) or "can't allocate memory" in str(error)


def account(stage: str, error: BaseException, peak_gb: float) -> dict[str, Any]:
    """What `plan.too_large` tells of a worker without memory."""
    said = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return {"stage": stage, "worker": world()[0], "peak_gb": peak_gb, "said": said}

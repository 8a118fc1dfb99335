"""The Ray that a run uses: the cluster it was submitted to, or one of its own on this machine."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import ray
import ray.data

OBJECT_STORE_BYTES = 300_000_000
"""Of a Ray of our own: rows pass through it a few at a time."""


@contextmanager
def ray_session() -> Iterator[None]:
    """Ray, running. One that was there before stays; one started here ends with the block.

    What workers print stays in Ray's logs and its dashboard: a run says what matters itself.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train tab
    if ray.is_initialized():
        yield
        return
    mine = not os.environ.get("RAY_ADDRESS")
    ray.init(
        object_store_memory=OBJECT_STORE_BYTES if mine else None,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        yield
    finally:
        ray.shutdown()

"""The Ray that a run uses: the cluster it was submitted to, or one of its own on this machine."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

OBJECT_STORE_BYTES = 300_000_000
"""Of a Ray of our own: rows pass through it a few at a time."""


@contextmanager
def ray_session() -> Iterator[None]:
    """Ray, running. One that was there before stays; one started here ends with the block."""
    # Without it Train warns that it cannot know how its own progress is to be shown.
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if ray.is_initialized():
        yield
        return
    if os.environ.get("RAY_ADDRESS"):
        ray.init(log_to_driver=True)
    else:
        ray.init(object_store_memory=OBJECT_STORE_BYTES, log_to_driver=True)
    try:
        yield
    finally:
        ray.shutdown()

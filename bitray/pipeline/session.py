"""The Ray that a run uses: the cluster it was submitted to, or one of its own on this machine."""

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import ray
import ray.data

from bitray.pipeline.cluster import check_dashboard
from bitray.settings import UserError

OBJECT_STORE_BYTES = 300_000_000
"""Of a Ray of our own: rows pass through it a few at a time."""
CONNECT_S = 10.0
LAST_WORDS = (
    "error: this process was killed, or Ray ended it because its node or the head of the cluster "
    "is gone; the same command continues"
)
_WATCHER = "import sys; sys.stdin.read(1) or print(sys.argv[1], file=sys.stderr)"
"""Its standard input ends with what it watches, or first says that all is well."""


@contextmanager
def ray_session() -> Iterator[None]:
    """Ray, running. One that was there before stays; one started here ends with the block.

    What workers print stays in Ray's logs and its dashboard: a run says what matters itself.
    """
    os.environ.setdefault("RAY_TRAIN_ENABLE_STATE_TRACKING", "1")  # the dashboard's Train tab
    if ray.is_initialized():
        yield
        return
    address = os.environ.get("RAY_ADDRESS")
    if address:
        check_address(address)
    with last_words(), _ray(address):
        yield


@contextmanager
def _ray(address: str | None) -> Iterator[None]:
    with _short_paths():
        context: Any = ray.init(
            address or "local",  # not one that somebody else left running on this machine
            object_store_memory=None if address else OBJECT_STORE_BYTES,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    try:
        check_dashboard(context.dashboard_url or "")
        yield
    finally:
        ray.shutdown()


@contextmanager
def last_words() -> Iterator[None]:
    """Inside, a process that ends with no chance to say why has it said by another. Ray ends the
    driver like that when it loses its node or the head of the cluster."""
    watcher = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", _WATCHER, LAST_WORDS],
        stdin=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is not for it
    )
    try:
        yield
    finally:
        with suppress(BrokenPipeError):
            watcher.communicate(b".")


@contextmanager
def _short_paths() -> Iterator[None]:
    """Sockets have names of 107 bytes at most; Ray's lie below a folder of temporary files."""
    try:
        yield
    except OSError as error:
        if "AF_UNIX path length" not in str(error):
            raise
        name = "RAY_TMPDIR" if "RAY_TMPDIR" in os.environ else "TMPDIR"
        raise UserError(
            f"{name}={os.environ.get(name)}: too long a path for Ray's sockets; set RAY_TMPDIR=/tmp"
        ) from None


def check_address(address: str) -> None:
    """`UserError` for a `RAY_ADDRESS` at which no Ray listens; Ray would try for five minutes."""
    scheme, _, place = address.rpartition("://")
    host, _, port = place.rpartition(":")
    right = "give the HOST:PORT of a cluster, or unset it to work on this machine alone"
    if scheme.startswith("http"):
        raise UserError(f"RAY_ADDRESS={address}: jobs are submitted there; {right}")
    if not port.isdigit():
        return  # such as `auto`, for which Ray looks here
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise UserError(f"RAY_ADDRESS={address}: nobody answers ({error}); {right}") from None

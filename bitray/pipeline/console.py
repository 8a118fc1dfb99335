"""What people see: lines from the processes of a run, on the driver's terminal and nothing else."""

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.queue import Empty, Queue
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

Say = Callable[[str], None]
_END = "\0"


@contextmanager
def console() -> Iterator[Queue]:
    """A queue whose lines are printed here until the block ends. Workers `speak` into it."""
    # Where the driver is, which it has to outlive; a lost one costs lines and no run.
    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
    options = {"num_cpus": 0, "max_restarts": -1, "max_task_retries": -1}
    lines = Queue(actor_options={**options, "scheduling_strategy": here})
    printer = threading.Thread(target=_print, args=(lines,), name="console", daemon=True)
    printer.start()
    try:
        yield lines
    finally:
        lines.put(_END)
        printer.join(timeout=5)
        lines.shutdown(force=True)  # all is printed; asked politely, it would be started again


def _print(lines: Queue) -> None:
    while True:
        try:
            line = lines.get(timeout=1.0)
        except Empty:
            continue
        if line == _END:
            return
        print(line, flush=True)


@contextmanager
def speaking(lines: Queue) -> Iterator[Say]:
    """Inside, our own warnings are lines too, for nobody reads the logs of a worker."""
    before = warnings.showwarning

    def show(message: Any, category: Any, filename: str, *rest: Any) -> None:
        if "bitray" in filename:
            lines.put(f"warning: {message}")
        else:
            before(message, category, filename, *rest)

    warnings.showwarning = show  # type: ignore[assignment]
    try:
        yield lines.put
    finally:
        warnings.showwarning = before

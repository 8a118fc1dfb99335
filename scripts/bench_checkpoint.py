"""How long training waits for a checkpoint: saved beside it, and saved while it waits.

A model of `--mb` megabytes of fp32 tensors is saved several times in both ways; the ratio is that
of the medians. The first copy of all is left out: it also takes the memory that the others reuse.
"""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from bitray import checkpoint

LAYER = 1 << 20


def seconds(call: Callable[[], None]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--dir", help="where to write; a temporary folder by default")
    said = parser.parse_args()
    layers = max(1, said.mb * 2**20 // (4 * LAYER))
    tensors = {"model": {f"layer_{n}": torch.randn(LAYER) for n in range(layers)}}
    waits, stalls, totals = [], [], []
    with tempfile.TemporaryDirectory(dir=said.dir) as folder:
        for step in range(said.times):
            place = checkpoint.step_directory(folder, step % 2)
            waits.append(seconds(lambda place=place: checkpoint.save(place, tensors, {})))
        saver = checkpoint.Saver()
        for step in range(said.times + 1):
            place = checkpoint.step_directory(folder, step % 2)
            stalls.append(seconds(lambda place=place: saver.save(place, tensors, {})))
            totals.append(stalls[-1] + seconds(saver.wait))
        saver.close()
    stall, wait = statistics.median(stalls[1:]), statistics.median(waits)
    print(f"{layers * 4} MB of tensors, {said.times} times")
    print(f"saved while training waits   {wait * 1000:8.1f} ms")
    print(f"saved beside training        {statistics.median(totals[1:]) * 1000:8.1f} ms in all")
    print(f"  of which training waits    {stall * 1000:8.1f} ms (first {stalls[0] * 1000:.1f} ms)")
    print(f"ratio                        {stall / wait:8.1%}")


if __name__ == "__main__":
    main()

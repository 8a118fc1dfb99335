"""The check after every export: unpack the file and compare it with what training uses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bitray.export.entries import Entry, quantized
from bitray.export.layout import PROJECTION_AXES
from bitray.export.packing import Bytes, Codes, rounded, unpack
from bitray.export.plan import Plan
from bitray.export.reader import GGUF, read_gguf
from bitray.export.report import Checked, ExportError


def check_gguf(path: str | Path, entries: Sequence[Entry], plan: Plan) -> Checked:
    """Unpack every tensor of the file; ExportError naming the first that is not as it should be.

    Ternary tensors: every code equal, padding zero, scale equal to the bit (after rounding to f16
    or bf16 where the type stores it so). Others: the bytes equal.
    """
    file = read_gguf(path)
    names = {entry.name for entry in entries}
    if file.tensors.keys() != names:
        odd = sorted(file.tensors.keys() ^ names)
        raise ExportError(f"{path}: tensors missing or too many: {', '.join(odd[:4])}")
    weights = zeros = ternary = 0
    for entry in entries:
        if file.tensors[entry.name].shape != entry.shape:
            raise ExportError(f"{path}: {entry.name} has shape {file.tensors[entry.name].shape}")
        if not entry.layers:
            _expect(path, entry.name, np.array_equal(file.raw(entry.name), entry.data()))
            continue
        for number, raw in enumerate(np.split(file.raw(entry.name), len(entry.layers))):
            codes = _check_layer(file, entry, plan, number, raw)
            ternary, weights = ternary + 1, weights + codes.size
            zeros += codes.size - int(np.count_nonzero(codes))
    return Checked(ternary, weights, zeros)


def _expect(path: str | Path, name: str, good: bool | np.bool_) -> None:
    if not good:
        raise ExportError(f"{path}: {name} is not what training uses")


def _check_layer(file: GGUF, entry: Entry, plan: Plan, number: int, raw: Bytes) -> Codes:
    """Codes and scale of one of the entry's layers, whose bytes are `raw`; returns the codes."""
    codes, scale = quantized(entry.layers[number])
    placed, found = unpack(raw, entry.shape[-2:], entry.kind)
    axes = PROJECTION_AXES[entry.projection]
    _expect(file.path, entry.name, np.array_equal(plan.layout.take(placed, *axes), codes))
    _expect(file.path, entry.name, np.count_nonzero(placed) == np.count_nonzero(codes))
    if plan.scale_tensors:
        exact = file.floats(entry.name.removesuffix("weight") + "scale")
        _expect(file.path, entry.name, exact[number] == np.float32(scale))
        scale = 1.0
    stored = {"tq1_0": "f16", "tq2_0": "f16", "i2_s": "f32"}.get(entry.kind.name, entry.kind.name)
    good = found.size > 0 or not codes.any()  # floats show a scale only where a code is not zero
    _expect(file.path, entry.name, good and bool(np.all(found == rounded(scale, stored))))
    return codes

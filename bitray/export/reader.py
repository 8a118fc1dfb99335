"""Reads GGUF files back: header, fields and tensors, including I2_S, which `gguf`'s reader rejects.

Written from the format's description, not with the library that writes the files, so that the check
after an export does not repeat the writer's mistakes.
"""

import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from jaxtyping import Float32

from bitray.export.packing import FILE_TYPES, GGML_NAMES, Bytes, FileType, nbytes, unpack_floats
from bitray.settings import UserError

_SCALARS = {
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
_STRING, _ARRAY = 8, 9


@dataclass(frozen=True)
class TensorRecord:
    """Where a tensor lies: `shape` in NumPy order (the file has it reversed), `offset` in bytes."""

    shape: tuple[int, ...]
    kind: FileType
    offset: int


@dataclass(frozen=True)
class GGUF:
    """An open GGUF file: `fields` by key, `tensors` by name, tensor bytes mapped into memory."""

    path: Path
    fields: dict[str, Any]
    tensors: dict[str, TensorRecord]
    data: np.ndarray

    def raw(self, name: str) -> Bytes:
        """The bytes of a tensor as they are in the file."""
        record = self.tensors[name]
        size = nbytes(record.shape, record.kind)
        found = np.array(self.data[record.offset : record.offset + size])
        if found.size != size:
            raise UserError(f"{self.path}: tensor {name} ends after the end of the file")
        return found

    def floats(self, name: str) -> Float32[np.ndarray, "..."]:
        """A tensor of float type, as fp32."""
        record = self.tensors[name]
        return unpack_floats(self.raw(name), record.kind.name).reshape(record.shape)


def read_gguf(path: str | Path) -> GGUF:
    """Open a little-endian GGUF file of version 3. Anything else is a UserError."""
    path = Path(path)
    with path.open("rb") as file:
        try:
            fields, tensors = _read_head(file)
        except struct.error as error:
            raise UserError(f"{path}: the file ends within its header") from error
        alignment = int(fields.get("general.alignment", 32))
        start = -(-file.tell() // alignment) * alignment
    data = np.memmap(path, np.uint8, mode="r", offset=start)
    return GGUF(path, fields, tensors, data)


def _read_head(file: BinaryIO) -> tuple[dict[str, Any], dict[str, TensorRecord]]:
    magic, version = file.read(4), _unpack(file, "I")
    if magic != b"GGUF" or version != 3:
        raise UserError(f"{file.name}: not a GGUF file of version 3")
    tensor_count, field_count = _unpack(file, "Q"), _unpack(file, "Q")
    fields = {}
    for _ in range(field_count):
        key = _string(file)
        fields[key] = _value(file, _unpack(file, "I"))
    tensors = {}
    for _ in range(tensor_count):
        name = _string(file)
        tensors[name] = _record(file, name)
    return fields, tensors


def _record(file: BinaryIO, name: str) -> TensorRecord:
    dims = [_unpack(file, "Q") for _ in range(_unpack(file, "I"))]
    ggml, offset = _unpack(file, "I"), _unpack(file, "Q")
    if ggml not in GGML_NAMES:
        raise UserError(
            f"{file.name}: tensor {name} has ggml type {ggml}, which bitray never writes"
        )
    return TensorRecord(tuple(reversed(dims)), FILE_TYPES[GGML_NAMES[ggml]], offset)


def _unpack(file: BinaryIO, code: str) -> Any:
    size = struct.calcsize("<" + code)
    return struct.unpack("<" + code, file.read(size))[0]


def _string(file: BinaryIO) -> str:
    return file.read(_unpack(file, "Q")).decode("utf-8")


def _value(file: BinaryIO, kind: int) -> Any:
    if kind == _STRING:
        return _string(file)
    if kind != _ARRAY:
        return _unpack(file, _SCALARS[kind])
    element, count = _unpack(file, "I"), _unpack(file, "Q")
    if element in _SCALARS:
        code = _SCALARS[element]
        size = struct.calcsize("<" + code) * count
        return list(struct.unpack(f"<{count}{code}", file.read(size)))
    return [_value(file, element) for _ in range(count)]

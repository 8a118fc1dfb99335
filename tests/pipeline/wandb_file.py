"""Reads what W&B's process wrote of a run that was recorded offline: a log in LevelDB's format."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 32768, 7
FULL, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """The protobuf records of a `.wandb` file, whose last one may still be written."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, at, kept = path.read_bytes(), HEADER, b""
    while at + HEADER <= len(data):
        if BLOCK - at % BLOCK < HEADER:  # the rest of a block is too short for a header
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        piece = data[at + HEADER : at + HEADER + length]
        if len(piece) < length or kind == 0:
            return
        at += HEADER + length
        kept = piece if kind in (FULL, FIRST) else kept + piece
        if kind in (FULL, LAST):
            record = Record()
            record.ParseFromString(kept)
            yield record


def histories(folder: Path) -> list[dict[str, Any]]:
    """All that was logged in the runs below a run's folder, in order."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json)
         for item in record.history.item}
        for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
        for record in records(path)
        if record.WhichOneof("record_type") == "history"
    ]  # fmt: skip


def run_records(folder: Path) -> list[Any]:
    """What the runs say of themselves."""
    return [
        record.run
        for path in sorted(folder.glob("wandb/offline-run-*/run-*.wandb"))
        for record in records(path)
        if record.WhichOneof("record_type") == "run"
    ]

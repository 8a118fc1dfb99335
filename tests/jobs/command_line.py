"""What tests of jobs share: small settings, and what a job that was called left behind."""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

JOBS = Path(__file__).parent.parent.parent / "jobs"
VOCABULARY = 300
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
"""Packs without padding."""
SMALL_MODEL = [f"model.config.{name}={value}" for name, value in SHAPE.items()]
SMALL_STAGES = ["training.max_seq_length=64", "training.batch_size=2"]


class Outcome(NamedTuple):
    """What a job left: exit code and what it printed."""

    code: int
    out: str
    err: str

    def sentence(self) -> str:
        """The one sentence of a refusal; fails for anything else."""
        assert self.code == 2, (self.code, self.out, self.err)
        lines = self.err.splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: "), self.err
        return lines[0].removeprefix("error: ")

    def sentences(self) -> list[str]:
        """The list of a refusal for several reasons."""
        assert self.code == 2, (self.code, self.out, self.err)
        head, *rest = self.err.splitlines()
        assert head == f"error: {len(rest)} problems:", self.err
        return [line.removeprefix("  - ") for line in rest]


Command = Callable[..., Outcome]


def tree(folder: str | Path) -> dict[str, bytes]:
    """Every file below a folder, and every folder."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in Path(folder).rglob("*")
    }

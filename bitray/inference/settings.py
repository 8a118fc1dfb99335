"""Settings of what a model says, and of what it is asked."""

from typing import Literal

from pydantic import Field

from bitray.data.rows import RowSettings
from bitray.settings import Settings


class Sampling(Settings):
    """How the next token is chosen."""

    max_new_tokens: int = Field(default=64, ge=1)
    temperature: float = Field(default=0.8, ge=0)
    """0 takes the most likely token."""
    top_k: int = Field(default=50, ge=0)
    """Only the k most likely; 0 for all."""
    top_p: float = Field(default=0.95, gt=0, le=1)
    """Only the most likely tokens that together have this probability."""
    seed: int = 0


class Diffusion(Settings):
    """How the masked tokens of a block become text."""

    strategy: Literal["greedy", "iterative", "adaptive"] = "adaptive"
    """`greedy`: all of a block after one forward. `iterative`: in `steps` forwards, the surest
    first. `adaptive`: after each forward those surer than `threshold`, at least one."""
    threshold: float = Field(default=0.9, gt=0, le=1)
    steps: int = Field(default=8, ge=1)
    block: int | None = Field(default=None, ge=1)
    """Tokens of a block; None: as the model was trained."""


class Task(RowSettings):
    """Prompts and their right completions: a choice among a few, or text to be written."""

    path: str
    """Folder, file or glob as of a source of files."""
    prompt: str | None = "{prompt}"
    completion: str | None = "{completion}"
    choices: tuple[str, ...] = ()
    """Completions that are compared; empty: one for each of `labels`, or else text is written."""
    rows: int = Field(default=200, ge=1)
    """At most so many."""
    max_new_tokens: int = Field(default=128, ge=1)
    """Of text that is written."""


class LMEval(Settings):
    """Tasks of the library lm-eval (EleutherAI's evaluation harness), when it is installed."""

    tasks: tuple[str, ...] = ()
    include_path: str | None = None
    """A folder with task files of one's own."""
    num_fewshot: int | None = Field(default=None, ge=0)
    """None: as each task says."""
    limit: int | None = Field(default=None, ge=1)
    """Documents of each task; None: all."""

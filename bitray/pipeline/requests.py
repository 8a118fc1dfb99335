"""Arguments of the smaller jobs. Light to import: `--help` and a typo need no torch and no Ray."""

from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from bitray.data import DataSettings
from bitray.export import GGUFType
from bitray.inference import Diffusion, LMEval, Sampling, Task
from bitray.settings import Composed


class Inspection(Composed):
    """Arguments that all of them take."""

    configs: ClassVar[Path] = Path(__file__).parent.parent / "configs"
    default_groups: ClassVar[dict[str, str]] = {}

    checkpoint: str
    """A run, a stage, a checkpoint, a Hugging Face folder or id."""


class Evaluation(Inspection):
    """Arguments of `jobs/evaluate.py`."""

    data: DataSettings | None = None
    """None: the data of the run that the checkpoint belongs to."""
    max_seq_length: int | None = Field(default=None, ge=8)
    """None: the longest of that run, else 1024."""
    rows: int = Field(default=512, ge=1)
    """At most so many rows per domain."""
    batch_size: int = Field(default=8, ge=1)
    output_dir: str = "runs"
    tasks: dict[str, Task] = {}
    """Prompts and right completions, by name; with them `data` is evaluated only if it is named."""
    lm_eval: LMEval = LMEval()


class Generation(Inspection):
    """Arguments of `jobs/generate.py`."""

    prompt: str
    mode: Literal["autoregressive", "diffusion"] = "autoregressive"
    """`diffusion` needs a model that was trained with `objectives.dlm`."""
    sampling: Sampling = Sampling()
    diffusion: Diffusion = Diffusion()


class Serving(Composed):
    """Arguments of `jobs/serve.py`. There are no groups: `model` is a file here."""

    configs: ClassVar[Path] = Path("no groups")
    default_groups: ClassVar[dict[str, str]] = {}

    model: str
    """A GGUF file; or a run, a stage, a checkpoint, a Hugging Face folder or id."""
    mode: Literal["autoregressive", "diffusion"] = "autoregressive"
    port: int = Field(default=8080, ge=0, le=65535)
    """0 takes a free one."""
    host: str = "127.0.0.1"
    """Another address needs a token in the environment."""
    context: int | None = Field(default=None, ge=8)
    """Positions of the cache of a GGUF file; None: all that the model was made for."""


class Export(Inspection):
    """Arguments of `jobs/export.py`."""

    format: Literal["gguf", "huggingface"]
    type: GGUFType = "i2_s"
    """Of a GGUF file."""
    output: str

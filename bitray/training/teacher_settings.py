"""Where the teacher runs and what it sends: one node, `model.teacher`, told apart by `type`."""

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from bitray.settings import Settings


class _Teacher(Settings):
    remote: ClassVar[bool] = False
    """Whether it sends only its likeliest tokens, from elsewhere."""


class _Local(_Teacher):
    path: str | None = None
    """Id or folder; None: the model as it was before it became ternary."""


class InProcess(_Local):
    """In the workers themselves: whole in each of them, or sharded over them (FSDP2)."""

    type: Literal["in_process"] = "in_process"
    layout: Literal["auto", "replicated", "sharded"] = "auto"
    """`auto`: sharded from `shard_above` parameters on."""
    shard_above: float = Field(default=2e9, ge=0)

    def sharded(self, parameters: int, workers: int) -> bool:
        """Whether a teacher of this size is sharded; one worker has nobody to share with."""
        wanted = self.layout == "sharded" or (
            self.layout == "auto" and parameters > self.shard_above
        )
        return wanted and workers > 1


class Offload(_Local):
    """In the workers' main memory; a layer is on the device while it computes, the next one on its
    way."""

    type: Literal["offload"] = "offload"


class FourBit(_Local):
    """In the workers, its projections in 4 bits (bitsandbytes; QLoRA, arXiv 2305.14314)."""

    type: Literal["four_bit"] = "four_bit"
    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quant: bool = True
    """Quantise the scales too: 0.4 bits less per weight."""


class _Remote(_Teacher):
    remote = True

    top_k: int = Field(default=64, ge=1)
    """Likeliest tokens that are sent for every position, with one number for all others."""
    ahead: int = Field(default=4, ge=1, le=8)
    """Micro-batches that are asked about before they are needed."""


class Actors(_Remote):
    """Ray actors, each with a whole teacher."""

    type: Literal["actors"] = "actors"
    path: str | None = None
    """Id or folder; None: the model as it was before it became ternary."""
    count: int = Field(default=1, ge=1)
    cpus: float = Field(default=1.0, ge=0)
    gpus: float = Field(default=0.0, ge=0)
    """Of each actor."""
    max_restarts: int = Field(default=3, ge=0)
    """Of each actor that dies; what it was asked is asked again."""
    send: Literal["fp32", "fp16", "bf16"] = "fp32"
    """What log-probabilities travel as."""


class Server(_Remote):
    """An OpenAI-compatible vLLM server. It knows log-probabilities at temperature 1 only."""

    type: Literal["server"] = "server"
    url: str
    """Up to and with `/v1`, such as http://teacher:8000/v1; a key is taken from VLLM_API_KEY."""
    model: str | None = None
    """The name it serves the model under; None: the only one that it serves."""
    top_k: int = Field(default=20, ge=1)
    """vLLM gives at most 20 unless it was started with a higher --max-logprobs."""
    timeout: float = Field(default=120.0, gt=0)
    """Seconds that one answer may take."""
    attempts: int = Field(default=6, ge=1)
    """Tries before it counts as gone; the waits between them double from half a second on."""
    concurrency: int = Field(default=16, ge=1)
    """Documents that are asked about at a time, by each worker."""

    @field_validator("url")
    @classmethod
    def _is_a_url(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"'{url}' is no address of a server; say http://HOST:PORT/v1")
        return url.rstrip("/")


Teachers = Annotated[InProcess | Offload | FourBit | Actors | Server, Field(discriminator="type")]
"""A node that does not name its `type` is of the default's."""
PLACEMENT = {
    *("layout", "shard_above", "ahead", "count", "cpus", "gpus", "max_restarts"),
    *("url", "timeout", "attempts", "concurrency"),
}
"""Settings that say where it runs, not what it says."""

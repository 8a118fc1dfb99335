"""What the smaller jobs do with a checkpoint: evaluate it, let it speak, export it."""

from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field

from bitray import checkpoint, storage
from bitray.data import DataSettings
from bitray.data.manifest import read_manifest
from bitray.data.prepare import prepare, prepared_identity
from bitray.data.shards import Shards, held_out
from bitray.export import GGUFType, write_gguf, write_huggingface
from bitray.inference import Sampling, evaluate, generate, perplexity
from bitray.models.loading import load_model, load_tokenizer
from bitray.models.losses import LossModel
from bitray.nn import set_strength
from bitray.pipeline.config import Config
from bitray.pipeline.finish import model_card
from bitray.pipeline.folders import resolve_checkpoint, run_of
from bitray.pipeline.report import Table
from bitray.pipeline.session import ray_session
from bitray.pipeline.worker import batches_of, read_evaluations
from bitray.settings import Composed, UserError
from bitray.training.loop import autocast_for, mean_loss


class Inspection(Composed):
    """Arguments that all of them take."""

    configs: ClassVar[Path] = Config.configs
    default_groups: ClassVar[dict[str, str]] = {}

    checkpoint: str
    """A run, a stage, a checkpoint, a Hugging Face folder or id."""

    def resolved(self) -> str:
        """The checkpoint that is meant."""
        return resolve_checkpoint(self.checkpoint)


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


class Generation(Inspection):
    """Arguments of `jobs/generate.py`."""

    prompt: str
    mode: Literal["autoregressive"] = "autoregressive"
    sampling: Sampling = Sampling()


class Export(Inspection):
    """Arguments of `jobs/export.py`."""

    format: Literal["gguf", "huggingface"]
    type: GGUFType = "i2_s"
    """Of a GGUF file."""
    output: str


def config_of(run_dir: str) -> Config:
    """The configuration that a run was made with."""
    uri = storage.join(run_dir, "config.yaml")
    return Config.load_text(storage.read_text(uri), uri)


def device_at_hand() -> torch.device:
    """The first GPU, else the CPUs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def evaluate_checkpoint(arguments: Evaluation) -> Table:
    """Loss and perplexity per domain."""
    where = arguments.resolved()
    model = load_model(where)
    data, length, root = _held_out_data(arguments, where, model.config.max_position_embeddings)
    manifest = read_manifest(root)
    if manifest is None:
        with ray_session():
            manifest = prepare(data, where, length, root)
    rows = held_out(Shards(root, manifest), "validation", arguments.rows)
    device = device_at_hand()
    batches = batches_of(rows, arguments.batch_size)
    losses = evaluate(LossModel(model).to(device), batches, device, autocast_for(device, "auto"))
    shown = [*losses.items(), ("mean", mean_loss(losses))]
    header = ("domain", "rows", "nats per token", "perplexity")
    return Table(
        header,
        [
            (
                name,
                str(len(rows[name][0])) if name in rows else "",
                f"{loss:.4f}",
                f"{perplexity(loss):.2f}",
            )
            for name, loss in shown
        ],
    )


def _held_out_data(arguments: Evaluation, where: str, most: int) -> tuple[DataSettings, int, str]:
    """Data, row length, and the folder of its prepared rows."""
    run_dir = run_of(where)
    data, length, output = arguments.data, arguments.max_seq_length, arguments.output_dir
    if data is None or length is None:
        if run_dir is None and data is None:
            raise UserError(
                f"data: {arguments.checkpoint} does not lie in a run, so say on what to evaluate "
                "it: data=embedded, or data=local data.sources.NAME.path=..."
            )
        if run_dir is not None:
            config = config_of(run_dir)
            data, output = data or config.data, config.output_dir
            length = length or max(s.max_seq_length for s in config.stages.values())
    assert data is not None
    length = min(length or 1024, most)
    identity = prepared_identity(data, where, length)
    return (
        data,
        length,
        storage.join(data.prepared_dir or storage.join(output, "prepared"), identity[:16]),
    )


def generate_text(arguments: Generation) -> str:
    """Prompt and continuation."""
    where = arguments.resolved()
    model = load_model(where)
    model.to(device_at_hand())  # type: ignore[arg-type]  # transformers types `to` away
    return arguments.prompt + generate(
        model, load_tokenizer(where), arguments.prompt, arguments.sampling
    )


def export_checkpoint(arguments: Export) -> Any:
    """The export's own report."""
    where = arguments.resolved()
    if checkpoint.is_complete(where):
        strength = checkpoint.load_state(where)["position"]["strength"]
    else:
        strength = 1.0
    model, tokenizer = load_model(where), load_tokenizer(where)
    set_strength(model, strength)  # the export refuses what is not wholly ternary yet
    if arguments.format == "gguf":
        return write_gguf(model, tokenizer, arguments.output, arguments.type)
    return write_huggingface(model, tokenizer, arguments.output, _card(where))


def _card(where: str) -> dict[str, Any]:
    run_dir = run_of(where)
    if run_dir is None:
        return {"name": Path(where).name}
    config = config_of(run_dir)
    identity = storage.read_json(storage.join(run_dir, "fingerprint.json"))
    return model_card(config, identity["fingerprint"], read_evaluations(run_dir))

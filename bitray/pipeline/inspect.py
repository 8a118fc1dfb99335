"""What the smaller jobs do: evaluate a checkpoint, let it speak, export it; show prepared rows."""

import os
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from textwrap import indent
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitray import storage
from bitray.data.job import Job, plan_job
from bitray.data.manifest import read_manifest
from bitray.data.preparation import run_job
from bitray.data.prepare import on_ray
from bitray.data.shards import Shards, held_out
from bitray.data.tokenizer import check_vocabulary
from bitray.export import write_gguf, write_huggingface
from bitray.inference import evaluate, generate, perplexity, server
from bitray.inference.downstream import ask, lm_eval
from bitray.inference.engines import CheckpointEngine, Engine, GGUFEngine
from bitray.models.batch import IGNORED
from bitray.models.loading import load_model, load_tokenizer
from bitray.models.losses import LossModel
from bitray.pipeline.config import Config
from bitray.pipeline.evaluations import batches_of, read_evaluations
from bitray.pipeline.finish import as_trained, model_card
from bitray.pipeline.folders import config_of, resolve_checkpoint, run_of
from bitray.pipeline.material import Material, pinned, rooted
from bitray.pipeline.report import Table
from bitray.pipeline.requests import Evaluation, Export, Generation, Serving
from bitray.pipeline.session import ray_session
from bitray.settings import UserError
from bitray.training.loop import autocast_for, mean_loss


def device_at_hand() -> torch.device:
    """The first GPU, else the CPUs."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loaded(where: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer, which has to fit it."""
    model, tokenizer = load_model(where), load_tokenizer(where)
    check_vocabulary(tokenizer, model.config.vocab_size)
    return model, tokenizer


def evaluate_checkpoint(arguments: Evaluation) -> list[Table]:
    """Tables: loss and perplexity per domain, and how well the model does the tasks that it is
    asked."""
    where = resolve_checkpoint(arguments.checkpoint)
    model, tokenizer = loaded(where)
    asked = bool(arguments.tasks or arguments.lm_eval.tasks)
    tables = [] if asked and arguments.data is None else [_losses(arguments, where, model)]
    model.to(device_at_hand())  # type: ignore[arg-type]  # transformers types `to` away
    if asked:
        tables.append(_tasks(arguments, model, tokenizer))
    return tables


def _tasks(
    arguments: Evaluation, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> Table:
    found = [
        (name, metric, f"{value:.4f}" if metric != "rows" else str(value))
        for name, task in arguments.tasks.items()
        for metric, value in ask(model, tokenizer, name, task).items()
    ]
    if arguments.lm_eval.tasks:
        theirs = lm_eval(model, tokenizer, arguments.lm_eval, arguments.batch_size)
        found += [(name, metric, f"{value:.4f}") for name, metric, value in theirs]
    return Table(("task", "metric", "value"), found)


def _losses(arguments: Evaluation, where: str, model: PreTrainedModel) -> Table:
    job = _held_out_data(arguments, where, model.config.max_position_embeddings)
    manifest = read_manifest(job.root_uri)
    if manifest is None:
        with ray_session():
            manifest = run_job(job, on_ray)
    rows = held_out(Shards(job.root_uri, manifest), "validation", arguments.rows)
    if not rows:
        raise UserError(
            "data.split.validation: no source has a held-out document; give more text or raise it"
        )
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
                str(len(rows[name].input_ids)) if name in rows else "",
                f"{loss:.4f}",
                f"{perplexity(loss):.2f}",
            )
            for name, loss in shown
        ],
    )


def _held_out_data(arguments: Evaluation, where: str, most: int) -> Job:
    """What is to be prepared, if it is not."""
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
    on_hub = pinned(run_dir) if run_dir else {}
    job = plan_job(data, load_tokenizer(where), min(length or 1024, most), "", on_hub)
    return rooted(job, storage.absolute(data.prepared_dir or storage.join(output, "prepared")))


def generate_text(arguments: Generation) -> str:
    """Prompt and continuation."""
    where = resolve_checkpoint(arguments.checkpoint)
    model, tokenizer = loaded(where)
    model.to(device_at_hand())  # type: ignore[arg-type]  # transformers types `to` away
    diffusion = arguments.diffusion if arguments.mode == "diffusion" else None
    try:
        text = generate(model, tokenizer, arguments.prompt, arguments.sampling, diffusion)
    except UserError as error:
        raise UserError(f"{arguments.checkpoint}: {error}") from None
    return arguments.prompt + text


def serve_model(arguments: Serving) -> None:
    """An OpenAI-style server over a checkpoint or a GGUF file, until somebody stops it."""
    token = os.environ.get(server.TOKEN) or None
    with server.listen(arguments.host, arguments.port, token) as sock:
        engine, name = engine_of(arguments)
        server.serve(engine, name, sock, token)


def engine_of(arguments: Serving) -> tuple[Engine, str]:
    """What is served, and its name."""
    if arguments.model.endswith(".gguf"):
        if arguments.mode != "autoregressive":
            raise UserError(f"mode={arguments.mode}: llama.cpp runs GGUF files autoregressively")
        if not Path(arguments.model).is_file():
            raise UserError(f"model={arguments.model}: no such file")
        return GGUFEngine(arguments.model, arguments.context), Path(arguments.model).stem
    where = resolve_checkpoint(arguments.model)
    model, tokenizer = loaded(where)
    model.to(device_at_hand())  # type: ignore[arg-type]  # transformers types `to` away
    return CheckpointEngine(model, tokenizer, arguments.mode), arguments.model.rstrip("/")


def export_checkpoint(arguments: Export) -> Any:
    """The export's own report."""
    where = resolve_checkpoint(arguments.checkpoint)
    model, tokenizer = as_trained(where), load_tokenizer(where)
    check_vocabulary(tokenizer, model.config.vocab_size)
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


# -------------------------------------------------------------------------------------- preview


def preview(config: Config, rows: int) -> str:
    """The first rows of every source as training sees them, of a `located` configuration; what no
    label asks for in ⟦ ⟧."""
    material = Material(config)
    folder = material.folders[max(material.kinds)]
    manifest, tokenizer = read_manifest(folder), material.load_tokenizer()
    assert manifest is not None, f"{folder} was just prepared"
    shards = Shards(folder, manifest)
    lines = ["", "rows as training sees them; tokens in ⟦ ⟧ are read but not learnt"]
    for source in manifest.sources:
        numbers = np.arange(min(rows, shards.num_rows(source)))
        found = shards.read(source, "train", numbers)
        batch = found.batch()
        for number, documents in enumerate(found.lengths):
            labels = batch.labels[number].numpy()
            lines += [
                "",
                f"--- {source}, row {number}: {len(documents)} documents, {sum(documents)} tokens, "
                f"{len(labels) - sum(documents)} of padding",
                *_documents(tokenizer, found.input_ids[number], labels, documents),
            ]
    return "\n".join(lines)


def _documents(
    tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, labels: np.ndarray, lengths: list[int]
) -> Iterator[str]:
    """Each document of a row under a line about it."""
    start = 0
    for number, count in enumerate(lengths, start=1):
        part = slice(start, start + count)
        learnt = labels[part] != IGNORED
        yield f"  document {number}: {count} tokens, {learnt.sum()} learnt"
        pairs = groupby(zip(learnt, ids[part], strict=True), key=lambda pair: bool(pair[0]))
        runs = [(known, tokenizer.decode([int(i) for _, i in run])) for known, run in pairs]
        text = "".join(str(text) if known else f"⟦{text}⟧" for known, text in runs)
        yield indent(text, "    ", lambda line: True)
        start += count

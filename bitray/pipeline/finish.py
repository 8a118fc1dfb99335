"""After the last stage: exports, samples, the table, the report."""

import statistics
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from bitray import checkpoint, storage
from bitray.export import write_gguf, write_huggingface
from bitray.inference import Sampling, generate
from bitray.models.convert import is_bitnet
from bitray.models.loading import load_model, load_tokenizer
from bitray.nn import set_strength
from bitray.pipeline.config import Config
from bitray.pipeline.cost import ESTIMATE, Expected, comparison, load
from bitray.pipeline.evaluations import CONVERTED, ORIGINAL, read_evaluations
from bitray.pipeline.folders import StageFolder
from bitray.pipeline.report import Table, read_metrics, write_report
from bitray.scratch import Scratch
from bitray.training import goodput
from bitray.training.loop import mean_loss

MB = 1e6


@dataclass
class Result:
    """What a run left behind. `str()` is the table for people."""

    run_dir: str
    losses: dict[str, dict[str, float]] = field(default_factory=dict)
    """Stage (or `original`, `converted`) -> domain -> held-out loss in nats, at strength 1."""
    files: dict[str, str] = field(default_factory=dict)
    """Kind of export -> where it lies."""
    report: str | None = None
    stopped: bool = False
    """Whether somebody asked the run to stop; the same command continues it."""
    lines: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        return "\n".join(self.lines)


def finish(config: Config, fingerprint: str) -> Result:
    """Export, write the report, and sum the run up. What is already there is kept."""
    result = Result(config.run_dir, read_evaluations(config.run_dir))
    last = list(config.stages)[-1]
    final = StageFolder(config.run_dir, last).final
    model, tokenizer = as_trained(final), load_tokenizer(final)
    if is_bitnet(model):
        result.files = _export(config, fingerprint, model, tokenizer, result.losses)
    set_strength(model, 1.0)
    sampling = Sampling(max_new_tokens=config.report.max_new_tokens)
    pairs = [(p, generate(model, tokenizer, p, sampling)) for p in config.report.prompts]
    tables = {"Held-out loss (nats per token, strength 1)": losses_table(config, result.losses)}
    sizes = size_table(config, sum(p.numel() for p in model.parameters()), result.files)
    rates = throughput_table(config.run_dir)
    tables |= {"Size": sizes, "Throughput": rates}
    tables |= {name: t for name, t in taken_tables(config).items() if t.rows}
    title = config.run_dir.rstrip("/").rpartition("/")[2]
    result.report = write_report(
        config.run_dir, title, tables, {last: pairs} if pairs else {}, config.dump()
    )
    for name, table in tables.items():
        result.lines += ["", name, table.text()]
    result.lines += ["", verdict(config, result.losses), goodput_line(config.run_dir)]
    result.lines += [f"report  {result.report}"]
    if result.files:
        result.lines.append(f"export  {storage.join(config.run_dir, 'export')}")
    return result


def as_trained(where: str) -> PreTrainedModel:
    """A model at the strength that its checkpoint was trained with, as an export has to see it."""
    model = load_model(where)
    if checkpoint.is_complete(where):
        set_strength(model, checkpoint.load_state(where)["position"]["strength"])
    return model


def _export(
    config: Config,
    fingerprint: str,
    model: Any,
    tokenizer: Any,
    losses: dict[str, dict[str, float]],
) -> dict[str, str]:
    """Kind -> file; each is checked against the codes of training as it is written."""
    found: dict[str, str] = {}
    folder = storage.join(config.run_dir, "export")
    for kind in config.export.gguf:
        found[kind] = storage.join(folder, f"{config.model.name}-{kind}.gguf")
        with _written(found[kind]) as path:
            write_gguf(model, tokenizer, path, kind)
    if config.export.huggingface:
        found["huggingface"] = storage.join(folder, "huggingface")
        card = model_card(config, fingerprint, losses)
        with _written(found["huggingface"]) as path:
            write_huggingface(model, tokenizer, path, card)
    return found


@contextmanager
def _written(uri: str) -> Iterator[str]:
    """A local path for what is to lie at `uri`."""
    if not storage.is_remote(uri):
        yield uri
        return
    with Scratch() as temporary:
        path = str(Path(temporary) / "export")
        yield path
        storage.upload(path, uri)


def model_card(
    config: Config, fingerprint: str, losses: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
    """What the README of an exported model says: recipe, data, identity, losses."""
    return {
        "name": config.model.name,
        "base_model": config.model.path,
        "fingerprint": fingerprint,
        "recipe": recipe(config),
        "stages": {
            name: f"{s.total_steps} steps of {s.rows_per_step} x {s.max_seq_length} tokens"
            for name, s in config.stages.items()
        },
        "data": {
            name: f"{config.data.shares()[name]:.1%}, licence {source.licence}"
            for name, source in config.data.sources.items()
        },
        "losses": losses.get(list(config.stages)[-1], {}),
    }


def recipe(config: Config) -> dict[str, str]:
    """What the stages train by, at their last step, and what they are measured against."""
    told = {"SubLN": f"{config.model.quantization.subln}, {config.model.quantization.subln_init}"}
    if any(stage.total_steps and stage.needs_teacher for stage in config.stages.values()):
        teacher = config.model.teacher
        told["teacher"] = f"{getattr(teacher, 'path', None) or config.model.name} ({teacher.type})"
    for name, stage in config.stages.items():
        if stage.total_steps:
            weights = stage.weights(stage.total_steps - 1).items()
            objectives = " + ".join(f"{weight:g} {each}" for each, weight in weights)
            optimizer = stage.optimizer
            told[name] = f"{objectives}; {optimizer.type} at {optimizer.lr:g}"
    return told


# ----------------------------------------------------------------------------------------- tables


def label(config: Config, name: str) -> str:
    """What a row of the table calls an evaluation."""
    if name == ORIGINAL or (name in config.stages and config.stages[name].dense):
        return f"teacher ({name})"
    if name == CONVERTED or (name in config.stages and config.stages[name].convert_only):
        return "ternary, not trained"
    return f"ternary, after {name}"


def losses_table(config: Config, losses: Mapping[str, Mapping[str, float]]) -> Table:
    """Evaluations by domain."""
    domains = list(dict.fromkeys(domain for found in losses.values() for domain in found))
    rows = [
        (
            label(config, name),
            *(f"{found[d]:.4f}" for d in domains),
            f"{mean_loss(dict(found)):.4f}",
        )
        for name, found in losses.items()
    ]
    return Table(("", *domains, "mean"), rows)


def size_table(config: Config, parameters: int, files: Mapping[str, str]) -> Table:
    """Bytes before and after."""
    before = parameters * 2
    rows = [("before, as 16-bit floats", f"{before:,}", "1.00")]
    for kind, uri in files.items():
        size = sum(info.size for info in storage.list_files(uri))
        name = f"GGUF {kind}" if kind != "huggingface" else "Hugging Face folder"
        rows.append((name, f"{size:,}", f"{size / before:.2f}"))
    return Table(("model", "bytes", "of before"), rows)


def throughput_table(run_dir: str) -> Table:
    """Median rate and waiting of each stage."""
    by_stage: dict[str, list[dict[str, Any]]] = {}
    for record in read_metrics(run_dir):
        if "train/tokens_per_second" in record:
            by_stage.setdefault(record["stage"], []).append(record)
    rows = [
        (
            stage,
            str(records[-1]["step"]),
            f"{records[-1]['train/tokens']:,.0f}",
            f"{statistics.median(r['train/tokens_per_second'] for r in records):,.0f}",
            f"{statistics.median(r['train/data_wait'] for r in records):.1%}",
        )
        for stage, records in by_stage.items()
    ]
    return Table(("stage", "steps", "tokens", "tokens/s", "waiting for data"), rows)


def taken_tables(config: Config) -> dict[str, Table]:
    """Where the time went, and what was expected beside what happened."""
    seconds = (goodput.read(config.run_dir) or {"seconds": {}})["seconds"]
    total = sum(seconds.values())
    rows = [(cause, f"{s:,.1f}", f"{s / total:.1%}") for cause, s in seconds.items() if s and total]
    tables = {"Goodput": Table(("cause", "seconds", "share"), rows)}
    uri = storage.join(config.run_dir, ESTIMATE)
    if storage.exists(uri):
        stages = load(storage.read_json(uri))
        tables["Expected and taken"] = Table(*comparison(stages, read_metrics(config.run_dir)))
        tables["Cost"] = _cost_table(config, stages, total)
    return tables


def _cost_table(config: Config, stages: Mapping[str, Expected], seconds: float) -> Table:
    """All workers are paid for all the time; those of the stage that has most of them."""
    hours = seconds / 3600 * max(each.workers for each in stages.values())
    each = [stage.worker_hours for stage in stages.values()]
    known = None if None in each else sum(filter(None, each))
    roots = (StageFolder(config.run_dir, name).root for name in stages)
    there = [f.size for root in roots if storage.exists(root) for f in storage.list_files(root)]
    most = sum(stage.checkpoint_gb * stage.checkpoints for stage in stages.values())

    def row(name: str, rate: float) -> tuple[str, str, str]:
        return name, f"{hours * rate:,.2f}", "unknown" if known is None else f"{known * rate:,.2f}"

    rates = config.cost.rates(config.gpu_name)
    return Table(("", "taken", "expected"), [
        row("worker hours", 1.0),
        *(row(f"$ at {who}", rate) for who, rate in rates.items()),
        ("GB of checkpoints", f"{sum(there) / 1e9:.3g}", f"at most {most:.3g}"),
    ])  # fmt: skip


def goodput_line(run_dir: str) -> str:
    """One sentence: what share of the time steps were taken that count, and where the rest went."""
    seconds = (goodput.read(run_dir) or {"seconds": {}})["seconds"]
    total = sum(seconds.values())
    if not total:
        return "goodput unknown"
    rest = sorted(((s, c) for c, s in seconds.items() if c != goodput.PRODUCTIVE), reverse=True)
    told = ", ".join(f"{c.replace('_', ' ')} {s / total:.1%}" for s, c in rest if s / total >= 5e-4)
    return f"goodput {seconds[goodput.PRODUCTIVE] / total:.1%} of {total:,.0f} s; {told}"


def verdict(config: Config, losses: Mapping[str, Mapping[str, float]]) -> str:
    """One sentence: whether the ternary model works, against its teacher."""
    teachers = [name for name in losses if label(config, name).startswith("teacher")]
    trained = [name for name in losses if label(config, name).startswith("ternary, after")]
    if not teachers or not trained:
        return f"run     {config.run_dir}"
    teacher, ternary = (mean_loss(dict(losses[n[-1]])) for n in (teachers, trained))
    relation = "not above" if ternary <= teacher else "above"
    return (
        f"mean held-out loss of the ternary model: {ternary:.4f}, {relation} its teacher's "
        f"{teacher:.4f} ({ternary - teacher:+.4f})"
    )

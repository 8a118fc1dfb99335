"""A run of 20 steps through everything, and what has to be true of it afterwards."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from bitray import checkpoint, storage
from bitray.pipeline.config import Config
from bitray.pipeline.evaluations import CONVERTED
from bitray.pipeline.finish import Result
from bitray.pipeline.folders import StageFolder, located
from bitray.pipeline.report import read_metrics
from bitray.pipeline.run import run
from bitray.settings import UserError, nearest
from bitray.training.loop import mean_loss

STEPS, ALONE, EVERY = 20, 4, 10
"""Of a stage; the first on one source; between checkpoints."""


class Smoke:
    """`combo=NAME workers=N` and words of a run that go before them."""

    @staticmethod
    def load(path: str | None = None, words: Sequence[str] = ()) -> Config:
        """The configuration of a smoke test."""
        own = dict(word.split("=", 1) for word in words if word.startswith(("combo=", "workers=")))
        rest = [word for word in words if not word.startswith(("combo=", "workers="))]
        combo, workers = own.get("combo", "ce_only"), own.get("workers", "1")
        combos = Config.groups()["smoke"]
        if combo not in combos:
            known = ", ".join(combos)
            raise UserError(f"combo={combo}: there is no such one{nearest(combo, combos)}; {known}")
        config = Config.load(path, [f"smoke={combo}", *_words(combo, workers), *rest])
        if config.model.path:  # it is trained already
            return config.override({"stages.stage0.max_steps": 0})
        dense = {"influence.enabled": False, "curriculum.phases": [], "optimizer.lr": 4e-3}
        return config.override({f"stages.stage0.{name}": value for name, value in dense.items()})


def _words(combo: str, workers: str) -> list[str]:
    return [
        f"experiment=smoke_{combo}_{workers}", f"scaling.num_workers={workers}",
        "resume.fresh=true", "data.split.validation=0.05", "data.split.probe=0.05",
        "evaluation.rows=16", "report.prompts=[]", "export.gguf=[]", "export.huggingface=false",
        f"training.max_steps={STEPS}", "training.batch_size=4",
        "training.gradient_accumulation_steps=2", "training.max_seq_length=256",
        f"training.save_every={EVERY}", "training.log_every=1",
        "training.schedule.warmup_steps=2", "training.lambda_warmup.enabled=false",
        f"training.curriculum.phases=[{{until: {ALONE / STEPS}, mixture: {{code: 1}}}},"
        " {until: 1.0}]",
        "training.influence.enabled=true", f"training.influence.warmup_steps={ALONE}",
        "training.influence.update_interval=8", "training.influence.budget=99",
        "training.influence.probe_rows=4", "training.influence.groups=2",
        "training.influence.group_rows=2",
    ]  # fmt: skip


def smoke(path: str | None, words: Sequence[str]) -> str:
    """Run, and check what came of it; a line about it. `UserError` for what is not as it should."""
    config = located(Smoke.load(path, words))
    result = run(config)
    stage = list(config.stages)[-1]
    problem = flaw(config, stage, result)
    if problem:
        raise UserError(f"smoke: {problem}")
    before, after = (mean_loss(result.losses[name]) for name in (CONVERTED, stage))
    return (
        f"smoke     passed: {stage}, {STEPS} steps, held-out loss {before:.3f} -> {after:.3f}, "
        f"checkpoints and metrics are whole: {config.run_dir}"
    )


def flaw(config: Config, stage: str, result: Result) -> str | None:
    """What is wrong with a run, or None."""
    folder = StageFolder(config.run_dir, stage)
    for directory in (folder.step(EVERY), folder.step(STEPS), folder.final):
        if not checkpoint.is_complete(directory):
            return f"there is no whole checkpoint at {directory}"
        if why := checkpoint.verify(directory):
            return f"{directory}: {why}"
    if (step := folder.result()["position"]["step"]) != STEPS:
        return f"{folder.final} is of step {step}, not {STEPS}"
    lines = read_metrics(config.run_dir)
    told = [line for line in lines if line["stage"] == stage and "train/loss" in line]
    return _flaw_of_metrics(config, stage, told) or _flaw_of_losses(stage, told, result.losses)


def _flaw_of_metrics(config: Config, stage: str, lines: Sequence[Mapping[str, Any]]) -> str | None:
    steps = [line["step"] for line in lines]
    if steps != list(range(1, STEPS + 1)):
        return f"metrics.jsonl has steps {steps}, not 1 to {STEPS}"
    other = [line["step"] for line in lines[:ALONE] if line["mixture/share_code"] != 1]
    if other or all(line["mixture/share_code"] == 1 for line in lines[ALONE:]):
        return f"the first {ALONE} steps, and only those, were to be of one source"
    if config.logging.tensorboard and not storage.list_files(
        storage.join(config.run_dir, "tensorboard", stage)
    ):
        return "TensorBoard was told nothing"
    journal = storage.read_json(storage.join(config.run_dir, "mixture", f"{stage}.json"))["journal"]
    if not any("scores" in entry["notes"] for entry in journal):
        return "influence has decided nothing"
    return None


def _flaw_of_losses(
    stage: str, lines: Sequence[Mapping[str, Any]], losses: Mapping[str, Mapping[str, float]]
) -> str | None:
    trained = [float(line["train/loss"]) for line in lines]
    if not all(map(math.isfinite, trained)):
        return "a loss is not finite"
    before, after = (mean_loss(losses[name]) for name in (CONVERTED, stage))
    if not after < before:
        return f"the held-out loss did not fall: {before:.4f} before, {after:.4f} after"
    return None

"""The stages that trials of a sweep train, and what they have in common."""

from bitray.pipeline.config import Config

BESIDE = ("output_dir", "experiment", "logging", "report", "export", "resume", "cost", "probe")
"""Of a run: what has no part in what a trial reports."""
CONVERTED = ("name", "path", "revision", "config", "tokenizer", "quantization")
"""Of a model: what the stages that trials have in common settle."""


def trained(config: Config) -> list[str]:
    """Stages that trials train: all that take steps and are not dense."""
    return [name for name, stage in config.stages.items() if stage.total_steps and not stage.dense]


def lengths(config: Config) -> dict[str, int]:
    """Tokens of every stage that trials train."""
    return {
        name: stage.total_steps * stage.rows_per_step * stage.max_seq_length
        for name in trained(config)
        for stage in [config.stages[name]]
    }


def before(config: Config) -> list[str]:
    """Stages that are done once, for all trials."""
    names = list(config.stages)
    return names[: names.index(trained(config)[0])]


def idle(path: str, config: Config) -> str | None:
    """Why it would make no difference to search a setting."""
    (root, *below), stages = path.split(".")[:2], trained(config)
    if root == "stages" and not set(below) & set(stages):
        return f"{path}: no trial trains this stage; they train {', '.join(stages)}"
    if root == "model" and set(below) & set(CONVERTED) and before(config):
        return f"{path}: all trials share the model of stage {before(config)[-1]}"
    if root in BESIDE:
        return f"{path}: it changes nothing that a trial reports"
    return None


def ends_early(config: Config) -> list[str]:
    """A trial that ended at a plateau would pass for one that the sweep stopped."""
    return [
        f"stages.{name}.early_stopping.enabled: trials end early by the sweep's scheduler alone; "
        "turn it off"
        for name in trained(config)
        if config.stages[name].early_stopping.enabled
    ]

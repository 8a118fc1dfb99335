"""Where things of a run lie, and what of it is done. Storage is the only memory of a run."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bitray import checkpoint, storage
from bitray.pipeline.config import Config
from bitray.settings import UserError
from bitray.training.settings import Resume

UPLOADED = "working_dir_files"
"""Folder of a Ray session in which jobs run that were submitted with their working directory."""


def located(config: Config) -> Config:
    """The configuration with absolute folders: workers start elsewhere."""
    places = {"output_dir": lasting(config.output_dir)}
    if config.data.prepared_dir:
        places["data.prepared_dir"] = lasting(config.data.prepared_dir)
    return config.override(places)


def lasting(uri: str) -> str:
    """The absolute place of what is to last. Where we run in Ray's copy of a working directory,
    which is another one after every edit and goes when Ray needs the room, a relative place is
    below the home folder instead; this is said."""
    place, here = storage.absolute(uri), Path.cwd()
    if UPLOADED not in here.parts or not Path(place).is_relative_to(here):
        return place
    kept = str(Path.home() / Path(place).relative_to(here))
    print(f"note: {uri} is {kept}, for this job's own folder is Ray's, and does not last")
    return kept


@dataclass(frozen=True)
class StageFolder:
    """`{run}/{stage}_checkpoint/checkpoints/{step_000500|best|final}`."""

    run_dir: str
    stage: str

    @property
    def root(self) -> str:
        """Folder of the checkpoints."""
        return storage.join(self.run_dir, f"{self.stage}_checkpoint", "checkpoints")

    def step(self, step: int) -> str:
        """Checkpoint of a step."""
        return checkpoint.step_directory(self.root, step)

    @property
    def best(self) -> str:
        """Checkpoint of the lowest held-out loss."""
        return storage.join(self.root, "best")

    @property
    def final(self) -> str:
        """Checkpoint of the end of the stage."""
        return storage.join(self.root, "final")

    @property
    def complete(self) -> bool:
        """Whether the stage has ended."""
        return checkpoint.is_complete(self.final)

    def left_out(self) -> list[range]:
        """Steps that are taken without training on what they draw, after a spike of the loss."""
        held = storage.read_json(self._left_out) if storage.exists(self._left_out) else []
        return [range(*each) for each in held]

    def leave_out(self, steps: range) -> None:
        """Have these steps left out from the next start on."""
        held = [*self.left_out(), steps]
        storage.write_json(self._left_out, [[each.start, each.stop] for each in held])

    @property
    def _left_out(self) -> str:
        return storage.join(self.run_dir, f"{self.stage}_checkpoint", "left_out.json")

    def result(self) -> dict[str, Any]:
        """What the stage left in its final checkpoint besides tensors."""
        return checkpoint.load_state(self.final)


def stage_folder(config: Config, stage: str) -> StageFolder:
    """The stage's folder, in this run or in the one that has done it for all."""
    known = config.stages.get(stage)
    return StageFolder((known and known.shared_run) or config.run_dir, stage)


def predecessor(config: Config, stage: str) -> str | None:
    """The checkpoint or model a stage starts from: said outright, else of the first predecessor
    that has ended, else the one to resume from, else the pretrained model; None: random weights."""
    settings = config.stages[stage]
    if settings.start_from:
        return settings.start_from
    for name in settings.predecessors:
        folder = stage_folder(config, name)
        if folder.complete:
            return folder.final
    return named_checkpoint(config, stage) or config.model.path


def resume_point(config: Config, stage: str, told: checkpoint.Told = checkpoint.warn) -> str | None:
    """The checkpoint inside the stage that it continues from: its own newest whole one, else the
    one that was named (or that RESUME_CHECKPOINT names), else None; of newer ones `told`."""
    own = checkpoint.newest_complete(StageFolder(config.run_dir, stage).root, told)
    return own or _named_inside(config, stage)


def passed_over(config: Config, stage: str, found: str | None) -> str | None:
    """What to say where a stage continues from `found`, and not from the one that was named."""
    named = _named_inside(config, stage)
    if named is None or found is None or storage.absolute(named) == storage.absolute(found):
        return None
    return (
        f"has checkpoints of its own and goes on from them, not from {named}, which was named; "
        "another experiment=NAME would begin there"
    )


def taken_over(config: Config, stage: str, found: str, epoch: int) -> Resume:
    """What to take over of a checkpoint that a stage continues from: what its settings say, but all
    of one that was written in this attempt at the run, which is an epoch of its lease."""
    own = found.startswith(StageFolder(config.run_dir, stage).root)
    if own and checkpoint.load_state(found).get("epoch") == epoch:
        return Resume()
    return config.stages[stage].resume


def _named_inside(config: Config, stage: str) -> str | None:
    """The checkpoint that was named, if it is one of this very stage."""
    named = named_checkpoint(config, stage)
    return named if named and stage_of(named) == stage else None


def named_checkpoint(config: Config, stage: str) -> str | None:
    """The checkpoint that a stage was told to start from, by setting or by environment."""
    return config.stages[stage].resume.checkpoint_path or os.environ.get("RESUME_CHECKPOINT")


def stage_of(checkpoint_uri: str) -> str | None:
    """The stage that wrote a checkpoint; None for a model that is none of ours."""
    if not checkpoint.is_complete(checkpoint_uri):
        return None
    return str(checkpoint.load_state(checkpoint_uri)["stage"])


def skipped_by_name(config: Config) -> list[str]:
    """Stages before the one whose checkpoint was named: what they did is in it."""
    names = list(config.stages)
    for name in names:
        named = named_checkpoint(config, name)
        found = stage_of(named) if named else None
        if found in names:
            return names[: names.index(found)]
    return []


def original(config: Config) -> str | None:
    """The model in full precision: the pretrained one, or what Stage 0 of this run made."""
    if config.model.path:
        return config.model.path
    dense = [name for name, stage in config.stages.items() if stage.dense]
    return stage_folder(config, dense[-1]).final if dense else None


def config_of(run_dir: str) -> Config:
    """The configuration that a run was made with."""
    uri = storage.join(run_dir, "config.yaml")
    return Config.load_text(storage.read_text(uri), uri)


def resolve_checkpoint(uri: str) -> str:
    """The checkpoint meant by a checkpoint's, a stage's or a run's folder (that of its last stage
    which has one); else the name itself, which may be a Hugging Face folder or id."""
    if checkpoint.is_complete(uri):
        return uri
    runs = [uri] if storage.exists(storage.join(uri, "config.yaml")) else []
    stages = [stage for run_dir in runs for stage in reversed(config_of(run_dir).stages)]
    roots = [storage.join(uri, "checkpoints"), uri]
    roots += [storage.join(uri, f"{stage}_checkpoint", "checkpoints") for stage in stages]
    for root in roots:
        final = storage.join(root, "final")
        if checkpoint.is_complete(final):
            return final
        if storage.exists(root) and (newest := checkpoint.newest_complete(root)):
            return newest
    return uri


def run_of(checkpoint_uri: str) -> str | None:
    """The run folder that a checkpoint lies in, or None."""
    run_dir = checkpoint_uri.rstrip("/")
    for _ in range(3):
        run_dir = run_dir.rpartition("/")[0]
    return run_dir if run_dir and storage.exists(storage.join(run_dir, "config.yaml")) else None


def teacher_of(config: Config) -> str:
    """The teacher: one that was named, else the model in full precision."""
    found = getattr(config.model.teacher, "path", None) or original(config)
    if found is None:
        raise UserError(
            "model.teacher: objectives need a teacher, but there is no pretrained model and no "
            "dense stage; give model.teacher.path or add stage0"
        )
    return found

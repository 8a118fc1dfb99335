"""What makes two runs the same run: the settings and inputs that the mathematics depends on."""

import hashlib
import json
import platform
import subprocess
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from bitray import storage
from bitray.events import Events
from bitray.pipeline.config import Config
from bitray.settings import UserError
from bitray.training.teacher_settings import PLACEMENT

_ELSEWHERE = {
    "output_dir", "experiment", "logging", "report", "export", "resume", "scaling", "gpu",
    "cost", "probe",
}  # fmt: skip
"""Settings that change where things go or who computes them, not what is computed."""
_BESIDE = {
    "log_every", "save_every", "keep_last", "resume", "scaling", "logits_chunk", "auto_batch_size",
    "memory_limit_gb", "memory_margin", "shared_run",
}  # fmt: skip
"""The same within a stage."""
_CUT = {"batch_size", "gradient_accumulation_steps"}
FILE = "fingerprint.json"
UNKNOWN = "unknown"


def mathematical_settings(config: Config) -> dict[str, Any]:
    """The effective settings that results depend on. How a global batch is cut is one of them only
    where experts are balanced by micro-batch; else it changes rounding, and which masks diffusion
    draws, but neither rows nor losses."""
    values = config.model_dump(mode="json", exclude=_ELSEWHERE | {"training"})
    for name, stage in values["stages"].items():
        said = config.stages[name]
        stage["rows_per_step"] = said.rows_per_step
        for key in _BESIDE | (set() if said.objectives.moe else _CUT):
            stage.pop(key, None)
    teacher = values["model"]["teacher"]
    for key in PLACEMENT:
        teacher.pop(key, None)
    if teacher["type"] == "offload":  # the same model, kept elsewhere
        teacher["type"] = "in_process"
    for key in ("prepared_dir", "overlap", "max_bad_rows", "max_bad_files"):
        values["data"].pop(key, None)
    return values


def fingerprint(settings: dict[str, Any], data: Mapping[str, Mapping[str, str]]) -> str:
    """sha256 over the canonical JSON of settings and of what the prepared data is made from."""
    text = json.dumps({"settings": settings, "data": data}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def claim(
    config: Config, data: Mapping[str, Mapping[str, str]], events: Events | None = None
) -> str:
    """Write the run's identity into its folder, or check that the folder holds this very run.

    Another run's folder is refused with the differences, unless `resume.fork=true`, which begins
    another lineage in it. Different versions of code and sources that are not committed are
    recorded and said, not refused. Returns the fingerprint.
    """
    uri = storage.join(config.run_dir, FILE)
    settings = mathematical_settings(config)
    found = environment()
    here: dict[str, Any] = {
        "fingerprint": fingerprint(settings, data),
        "settings": settings,
        "data": data,
        "environment": found,
        "lineage": 1,
    }
    notes = []
    stages = [one for one in storage.list_dirs(config.run_dir) if one.endswith("_checkpoint")]
    if stages and storage.exists(uri):  # else nothing came of it that could be lost
        there = storage.read_json(uri)
        here["lineage"] = there.get("lineage", 1)
        if there["fingerprint"] != here["fingerprint"] and not config.resume.fork:
            changed = differences(
                {"prepared rows": there["data"], **there["settings"]},
                {"prepared rows": data, **settings},
            )
            raise UserError(_refusal(config.run_dir, changed))
        here["lineage"] += there["fingerprint"] != here["fingerprint"]
        for name, version in differences(there["environment"], found).items():
            notes.append(f"{name} was {version[0]!r} when this run began and is {version[1]!r} now")
    if found["dirty"] == "True":
        notes.append("the sources are not committed; their hash is in " + uri)
    for note in notes:
        print(f"note: {note}")
    storage.write_json(uri, here)
    if events:
        known = ("fingerprint", "lineage", "environment")
        events.write("start", notes=notes, **{name: here[name] for name in known})
    storage.write_text(storage.join(config.run_dir, "config.yaml"), config.dump())
    return str(here["fingerprint"])


def _refusal(run_dir: str, changed: dict[str, tuple[Any, Any]]) -> str:
    lines = [f"  {path}: {old!r} there, {new!r} now" for path, (old, new) in changed.items()]
    return (
        f"{run_dir} holds a run with other settings; take another experiment=NAME, or continue "
        f"it with resume.fork=true, or delete it with resume.fresh=true. What differs:\n"
        + "\n".join(lines)
    )


def differences(old: Any, new: Any, path: str = "") -> dict[str, tuple[Any, Any]]:
    """Dotted path -> (old, new) of every leaf that differs."""
    if isinstance(old, dict) and isinstance(new, dict):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*old, *(k for k in new if k not in old)]:
            found |= differences(old.get(key), new.get(key), f"{path}.{key}" if path else str(key))
        return found
    return {} if old == new else {path: (old, new)}


def environment() -> dict[str, str]:
    """Versions and the state of the sources: recorded, never a reason to refuse."""
    packages = ("torch", "transformers", "ray", "numpy", "pyarrow")
    versions = {name: metadata.version(name) for name in packages}
    return {**versions, "python": platform.python_version(), "sources": _sources(), **_git()}


def _sources() -> str:
    package = Path(__file__).parent.parent
    hashed = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        hashed.update(path.relative_to(package).as_posix().encode() + path.read_bytes())
    return hashed.hexdigest()[:16]


def _git() -> dict[str, str]:
    """The commit of the sources, and whether they differ from it; `UNKNOWN` where git is not there,
    or does not know them."""
    commit, changes = _ask("rev-parse", "HEAD"), _ask("status", "--porcelain")
    dirty = None if changes is None else str(bool(changes))
    return {"commit": commit or UNKNOWN, "dirty": dirty or UNKNOWN}


def _ask(*words: str) -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), *words]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None

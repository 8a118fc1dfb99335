"""The rules of the house: which way imports point, where Ray may be imported, presets that load."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from bitray import Config
from bitray.pipeline.requests import Evaluation

ROOT = Path(__file__).parent.parent
WITH_RAY = ("bitray/pipeline/", "bitray/tuning/", "bitray/data/prepare.py", "bitray/data/actor.py",
            "bitray/data/stream.py")  # fmt: skip


def test_imports_point_down_only() -> None:
    linter = Path(sys.executable).parent / "lint-imports"
    done = subprocess.run([linter], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


def test_ray_is_imported_only_where_it_may_be() -> None:
    for path in (ROOT / "bitray").rglob("*.py"):
        name = path.relative_to(ROOT).as_posix()
        if name.startswith(WITH_RAY):
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            modules += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(m.split(".")[0] == "ray" for m in modules), name


@pytest.mark.parametrize("package", ["nn", "models", "objectives", "optim", "data", "export",
                                     "training", "inference"])  # fmt: skip
def test_packages_import_where_there_is_no_ray(package: str) -> None:
    code = (
        f"import sys; sys.modules['ray'] = None; import bitray.{package} as p; "
        "[getattr(p, n) for n in getattr(p, '__all__', []) if n != 'MixtureActor']"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def choices(*groups: str) -> list[tuple[str, str]]:
    return [(g, name) for g, names in Config.groups().items() if g in groups for name in names]


@pytest.mark.parametrize(("group", "name"), choices("model", "scaling", "pipeline", "gpu"))
def test_every_preset_loads(group: str, name: str) -> None:
    assert Config.load(overrides=[f"{group}={name}"])


@pytest.mark.parametrize(("group", "name"), choices("training"))
def test_every_stage_preset_loads_and_runs_alone(group: str, name: str) -> None:
    assert len(Config.load(overrides=[f"training={name}"]).stages) == 1


@pytest.mark.parametrize(("group", "name"), choices("tasks"))
def test_every_set_of_tasks_loads(group: str, name: str) -> None:
    tasks = Evaluation.load(None, ["checkpoint=x", f"{group}={name}"]).tasks
    assert tasks["sst2"].answers == (" negative", " positive")
    assert tasks["cnn_dailymail"].answers == (), "text to be written"


def test_presets_have_a_first_line_of_help() -> None:
    for group, names in Config.groups().items():
        for name, about in names.items():
            assert len(about) > 10, f"{group}/{name}.yaml begins with no comment"


def test_jobs_are_short() -> None:
    for path in (ROOT / "jobs").glob("*.py"):
        tree = ast.parse(path.read_text())
        code = len(path.read_text().splitlines()) - len(
            ast.get_docstring(tree, clean=False).splitlines()
        )  # type: ignore[union-attr]
        assert code <= 40, path


def test_the_controller_of_training_does_not_load_models() -> None:
    """It asks `streams` where data is to continue, at every start of the workers."""
    said = (
        "import sys, bitray.pipeline.streams; print('transformers.modeling_utils' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", said], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "False"

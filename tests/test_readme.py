"""Commands of the README are commands: jobs exist and take these words, make knows its targets.

That jobs do what they say is tested in `tests/jobs` and `tests/pipeline`.
"""

import re
import shlex
from pathlib import Path

import pytest

from bitray import Config
from bitray.pipeline.requests import Evaluation, Export, Generation, Serving
from bitray.pipeline.smoke import Smoke
from bitray.settings import Composed
from bitray.tuning import SearchSpace

ROOT = Path(__file__).parent.parent
JOBS: dict[str, type[Composed]] = {
    "pretrain": Config, "prepare": Config, "evaluate": Evaluation, "generate": Generation,
    "export": Export, "serve": Serving, "tune": SearchSpace, "smoke": Smoke,
}  # fmt: skip


def commands() -> list[str]:
    """Every command of a code block, continued lines joined."""
    blocks = re.findall(r"^```\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [line.strip() for line in lines if re.match("make|python|ray|export", line)]


def test_the_readme_has_commands() -> None:
    assert {"make demo", "make test"} <= set(commands()) and len(commands()) >= 8


@pytest.mark.parametrize("command", [c for c in commands() if " jobs/" in c])
def test_jobs_take_these_words(command: str) -> None:
    words = shlex.split(command)
    at = next(k for k, word in enumerate(words) if word.startswith("jobs/"))
    path = ROOT / words[at]
    assert path.is_file()
    said = words[at + 1 :]
    file = next((str(ROOT / word) for word in said if word.endswith(".yaml")), None)
    assert JOBS[path.stem].load(file, [word for word in said if "=" in word])


def test_muon_as_is_usual_in_every_stage() -> None:
    """Defaults of a type know no stage (2.4e-3, 0.01), so the README has the words."""
    (command,) = (c for c in commands() if "muonclip" in c)
    stages = Config.load(overrides=[w for w in shlex.split(command) if "=" in w]).stages
    found = {name: (s.optimizer.type, s.optimizer.lr, s.optimizer.weight_decay)
             for name, s in stages.items() if s.total_steps}  # fmt: skip
    assert found == {"stage1_9": ("muonclip", 3e-3, 0.01), "stage2": ("muonclip", 2.4e-3, 0.0)}


@pytest.mark.parametrize("command", [c for c in commands() if c.startswith("make")])
def test_make_knows_its_targets(command: str) -> None:
    target = command.split()[1]
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.M)


def test_what_it_names_is_there() -> None:
    text = (ROOT / "README.md").read_text()
    named = re.findall(r"\b(?:jobs|scripts|cluster|search_spaces)/[\w./]*\w", text)
    assert len(named) > 20
    assert [path for path in named if not (ROOT / path).exists()] == []

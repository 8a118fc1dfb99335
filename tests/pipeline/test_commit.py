"""A pretrained model of the Hub is taken at one commit, all along a run."""

from pathlib import Path

import pytest
import torch

from bitray import Config
from bitray.models.loading import load_teacher, load_tokenizer
from bitray.pipeline.checks import outline
from bitray.pipeline.identity import FILE, claim
from bitray.pipeline.material import at_commit
from bitray.settings import UserError
from bitray.storage import read_json

OLD, MAIN = "1" * 40, "2" * 40


def config(folder: Path, path: str, *words: str) -> Config:
    words = ("model=smollm2_135m", f"model.path={path}", "pipeline=standard", *words)
    return Config.load(overrides=[f"output_dir={folder}", "experiment=mine", *words])


def test_a_run_goes_on_with_the_commit_that_it_began_with(hub_model: str, tmp_path: Path) -> None:
    began = at_commit(config(tmp_path, hub_model))
    assert began.model.revision == MAIN
    claim(began, {})
    assert read_json(f"{began.run_dir}/{FILE}")["settings"]["model"]["revision"] == MAIN
    (tmp_path / "models--org--small" / "refs" / "main").write_text(OLD)  # somebody pushes
    assert at_commit(config(tmp_path, hub_model)).model.revision == MAIN
    assert at_commit(config(tmp_path, hub_model, "resume.fresh=true")).model.revision == OLD
    assert at_commit(config(tmp_path, hub_model, "model.revision=old")).model.revision == OLD


def test_model_and_tokenizer_are_of_the_revision(hub_model: str, tmp_path: Path) -> None:
    old = at_commit(config(tmp_path, hub_model, "model.revision=old"))
    vocabularies = [load_tokenizer(hub_model, name).get_vocab() for name in ("old", OLD, MAIN)]
    assert vocabularies[0] == vocabularies[1] != vocabularies[2]
    folder = tmp_path / "models--org--small" / "snapshots" / MAIN
    (folder / "config.json").unlink()
    assert outline(old).config.vocab_size == 260
    with pytest.raises(UserError):
        outline(config(tmp_path, hub_model))
    assert (load_teacher(hub_model, torch.float32, "cpu", OLD).model.norm.weight == 1).all()


def test_a_folder_has_no_revision(hub_model: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "models--org--small" / "snapshots" / OLD)
    assert at_commit(config(tmp_path, folder)).model.revision is None
    with pytest.raises(UserError, match=r"model\.revision: old, but .* is a folder"):
        at_commit(config(tmp_path, folder, "model.revision=old"))

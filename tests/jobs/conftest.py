"""Jobs as a user calls them, and the tiny models and runs that they are called on.

`command` runs a script in this process with its arguments, which is the command line less seconds
of imports; what only a process of its own can show is in `test_processes.py`.
"""

import gzip
import json
import os
import runpy
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command_line import (
    JOBS,
    SHAPE,
    SMALL_MODEL,
    SMALL_STAGES,
    VOCABULARY,
    Command,
    Outcome,
    tree,
)
from transformers import PreTrainedTokenizerBase
from transformers.utils.logging import disable_progress_bar

from bitray import Config
from bitray.data import embedded, train_tokenizer
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model, model_files, save_model
from bitray.models.losses import LossModel
from bitray.pipeline.folders import StageFolder, located
from bitray.pipeline.identity import claim
from bitray.training import state
from bitray.training.state import Position


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, out of anybody's account."""
    monkeypatch.chdir(tmp_path)
    for name in ("RESUME_CHECKPOINT", "WANDB_API_KEY", "RAY_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture(autouse=True)
def no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray does not start by accident: what is refused is refused before."""
    if request.node.get_closest_marker("ray") is None:

        def refuse(*_: object, **__: object) -> None:
            raise AssertionError("this was to be refused before Ray starts")

        monkeypatch.setattr("ray.init", refuse)
        monkeypatch.setattr("ray.is_initialized", lambda: False)


@pytest.fixture
def command(
    here: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> Command:
    """`command("pretrain", *words)` is `python jobs/pretrain.py *words` in an empty folder."""

    def run(job: str, *words: str) -> Outcome:
        monkeypatch.setattr(sys, "argv", [f"jobs/{job}.py", *words])
        disable_progress_bar()  # a process of its own does so by environment
        capfd.readouterr()
        code = 0
        try:
            runpy.run_path(str(JOBS / f"{job}.py"), run_name="__main__")
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        # Ray's C++ core writes by itself about how Ray Data starts its actors.
        mine = [line for line in err.splitlines() if "core_worker.cc" not in line]
        return Outcome(code, out, "\n".join(mine))

    return run


# ----------------------------------------------------------------------------------------- things


@pytest.fixture(scope="session")
def prose() -> list[str]:
    """Documents of a line or a few each."""
    texts = embedded.documents("prose", max_bytes=120_000)
    return [part for text in texts for part in text.split("\n\n") if part.strip()]


@pytest.fixture(scope="session")
def corpus(prose: list[str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of jsonl and jsonl.gz."""
    folder = tmp_path_factory.mktemp("text") / "books"
    folder.mkdir()
    lines = [json.dumps({"text": text}) + "\n" for text in prose]
    half = len(lines) // 2
    (folder / "a.jsonl").write_text("".join(lines[:half]))
    (folder / "b.jsonl.gz").write_bytes(gzip.compress("".join(lines[half:]).encode()))
    return str(folder)


@pytest.fixture(scope="session")
def tokenizer(prose: list[str]) -> PreTrainedTokenizerBase:
    return train_tokenizer(prose, VOCABULARY)


@pytest.fixture(scope="session")
def models(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, prose: list[str]
) -> Path:
    """`dense`: a Hugging Face folder; `ternary`: one of `save_model`; `wide`: with a tokenizer that
    its embedding cannot hold; `narrow`: of one layer; `pickled`: with weights as a pickle alone;
    `qwen2`; `gpt2`; `stranger`: with a tokenizer of its own."""
    root = tmp_path_factory.mktemp("models")
    torch.manual_seed(0)
    for name, kind, fields in (
        ("dense", "llama", {}),
        ("wide", "llama", {"vocab_size": VOCABULARY - 20}),
        ("qwen2", "qwen2", {}),
        ("narrow", "llama", {"hidden_size": 192, "num_hidden_layers": 1}),
    ):
        model = build_model({"model_type": kind, **SHAPE, "tie_word_embeddings": True, **fields})
        model.save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    model = build_model({"model_type": "llama", **SHAPE, "tie_word_embeddings": True})
    save_model(to_bitnet(model, "none"), str(root / "ternary"), tokenizer)
    (root / "pickled").mkdir()
    (root / "pickled" / "config.json").write_text((root / "dense" / "config.json").read_text())
    tokenizer.save_pretrained(root / "pickled")
    torch.save({}, root / "pickled" / "pytorch_model.bin")
    (root / "gpt2").mkdir()
    (root / "gpt2" / "config.json").write_text('{"model_type": "gpt2", "n_layer": 2}')
    tokenizer.save_pretrained(root / "gpt2")
    shutil.copytree(root / "dense", root / "stranger")
    train_tokenizer(prose[::-2], VOCABULARY).save_pretrained(root / "stranger")
    return root


@pytest.fixture(scope="session")
def run_dir(
    tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase, corpus: str
) -> str:
    """The folder of a run whose stage 1.9 stands at step 2, strength 0.4, and whose stage 2 ended.

    Its checkpoints are written as workers write them, of a model that was not trained.
    """
    root = tmp_path_factory.mktemp("runs")
    words = [f"output_dir={root}", "experiment=tiny", *SMALL_MODEL, *SMALL_STAGES]
    words += ["data=local", f"data.sources.books.path={corpus}", "data.split.validation=0.1"]
    config = located(Config.load(overrides=words))
    fingerprint = claim(config, {})
    model = to_bitnet(build_model(config.model.config or {}), "none")
    files, wrapped = model_files(model, tokenizer), LossModel(model)
    optimizer = config.stages["stage2"].optimizer.build(wrapped)
    for stage, strength in (("stage1_9", 0.4), ("stage2", 1.0)):
        folder = StageFolder(config.run_dir, stage)
        directory = folder.final if strength == 1 else folder.step(2)
        held = state.as_json(Position(step=2, strength=strength), None)
        state.save(directory, wrapped, optimizer, {**held, "stage": stage}, files)
    assert fingerprint
    return config.run_dir


@pytest.fixture
def kept(here: Path) -> Iterator[Path]:
    """A run in the way, which no refusal may touch: checked after the test."""
    folder = here / "runs" / "bitray_demo"
    (folder / "stage0_checkpoint").mkdir(parents=True)
    (folder / "fingerprint.json").write_text('{"precious": true}')
    (folder / "stage0_checkpoint" / "weights").write_bytes(os.urandom(16))
    before = tree(folder)
    yield folder
    after = tree(folder)
    assert {name: after.get(name) for name in before} == before
    added = {name.split("/")[0] for name in after.keys() - before.keys()}
    assert added <= {"lease", "events"}, "a driver that came and went is all there is to tell"

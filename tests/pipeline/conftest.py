"""One small run of the whole road, on two workers, that many tests look at."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from road import Road

from bitray import Config
from bitray.data import embedded, train_tokenizer
from bitray.models.loading import build_model, save_model
from bitray.pipeline.run import run

STEPS = {"stage0": 20, "stage1_9": 6, "stage2": 12}


HUB_MODEL = {
    "model_type": "llama", "vocab_size": 260, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
}  # fmt: skip


@pytest.fixture
def hub_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A model of the Hub as it lies when it was downloaded: `old` is all ones, `main` all twos."""
    root = tmp_path / "models--org--small"
    (root / "refs").mkdir(parents=True)
    for number, branch in enumerate(("old", "main"), 1):
        sha = str(number) * 40
        (root / "refs" / branch).write_text(sha)
        model = build_model(HUB_MODEL)
        torch.nn.init.constant_(model.model.norm.weight, number)
        save_model(model, str(root / "snapshots" / sha))
        words = train_tokenizer([f"{branch} " * 99], 260)
        words.save_pretrained(root / "snapshots" / sha)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return "org/small"


@pytest.fixture(scope="session")
def words(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Command-line words of a tiny run. All runs share one folder of prepared rows.

    Three micro-batches a step, so that two workers do not share them evenly, and dimensions that
    every export packs without padding.
    """
    root = tmp_path_factory.mktemp("runs")
    notes = root / "notes"
    notes.mkdir()
    texts = list(embedded.documents("prose", max_bytes=120_000))
    lines = [json.dumps({"text": part}) for text in texts for part in text.split("\n\n")]
    (notes / "a.jsonl").write_text("\n".join(lines))

    def of(experiment: str, *more: str) -> list[str]:
        shape = {
            "vocab_size": 320, "hidden_size": 256, "intermediate_size": 256, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        }  # fmt: skip
        return [
            f"output_dir={root}", f"experiment={experiment}",
            *(f"model.config.{name}={value}" for name, value in shape.items()),
            "model.quantization.subln=paper",
            "data.sources.code.max_bytes=60000", "data.sources.arithmetic.max_bytes=60000",
            "data.sources.prose.type=local", f"data.sources.prose.path={notes}",
            "data.split.validation=0.1", "data.split.probe=0",
            "training.batch_size=2", "training.gradient_accumulation_steps=3",
            "training.max_seq_length=64", "training.log_every=1", "training.save_every=4",
            "training.keep_last=2", "training.eval_every=5", "training.eval_rows=4",
            "evaluation.rows=8", "report.max_new_tokens=8",
            "export.gguf=[i2_s,tq2_0]", "export.huggingface=true",
            *(f"stages.{name}.max_steps={count}" for name, count in STEPS.items()),
            "stages.stage1_9.lambda_warmup.warmup_steps=4",
            # A small rate: rounding is discontinuous, so a last bit may become a code that flips.
            "stages.stage2.optimizer.lr=2e-4",
            *more,
        ]  # fmt: skip

    return of


@pytest.fixture(scope="session")
def configured(words: Callable[..., list[str]]) -> Callable[..., Config]:
    """The configuration that an experiment and more words make."""
    return lambda *said: Config.load(overrides=words(*said))


@pytest.fixture(scope="session")
def road(ray_cluster: None, configured: Callable[..., Config]) -> Road:
    """Stages 0, 1, 1.9 and 2 on two workers, undisturbed."""
    config = configured("undisturbed")
    return Road(config, run(config))

"""The preset of block diffusion through a run: a vocabulary without room grows, and is kept."""

import json
from pathlib import Path

import pytest
import torch

from bitray import Config
from bitray.data import embedded, train_tokenizer
from bitray.models.loading import build_model, load_model, load_tokenizer, save_model
from bitray.pipeline.inspect import generate_text
from bitray.pipeline.requests import Generation
from bitray.pipeline.run import run

SIZE = 300


@pytest.mark.slow
@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
def test_a_dense_model_learns_block_diffusion(tmp_path: Path) -> None:
    """From its own teacher, whose vocabulary lacks the mask token."""
    texts = list(embedded.documents("prose", max_bytes=60_000))
    lines = [json.dumps({"text": part}) for text in texts for part in text.split("\n\n")]
    (tmp_path / "notes.jsonl").write_text("\n".join(lines))
    torch.manual_seed(0)
    shape = {
        "model_type": "llama", "vocab_size": SIZE, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    save_model(build_model(shape), str(tmp_path / "dense"), train_tokenizer(texts, SIZE))
    config = Config.load(overrides=[
        "model=smollm2_135m", f"model.path={tmp_path / 'dense'}", "model.name=mine",
        "training=dlm_distill", "training.max_steps=4", "training.batch_size=2",
        "training.gradient_accumulation_steps=2", "training.max_seq_length=64",
        "training.objectives.dlm.block=8", "training.log_every=1", "evaluation.rows=4",
        "data=local", f"data.sources.notes.path={tmp_path / 'notes.jsonl'}",
        "data.split.validation=0.1", "data.split.probe=0", f"output_dir={tmp_path / 'runs'}",
    ])  # fmt: skip
    result = run(config)
    lines = [json.loads(line) for line in (Path(result.run_dir) / "metrics.jsonl").open()]
    steps = [line for line in lines if "train/loss" in line]
    assert len(steps) == 4
    for name in ("continue_pretrain_loss", "dlm_loss", "tcs_distill_loss", "dlm_num_masked"):
        assert all(step[f"train/{name}"] > 0 for step in steps), name
    final = f"{result.run_dir}/dlm_distill_checkpoint/checkpoints/final"
    model, tokenizer = load_model(final), load_tokenizer(final)
    assert (model.config.mask_token_id, model.config.diffusion_block) == (SIZE, 8)
    assert (model.config.vocab_size, tokenizer.mask_token_id) == (320, SIZE)
    for mode in ("autoregressive", "diffusion"):
        said = [f"checkpoint={result.run_dir}", "prompt=The", f"mode={mode}"]
        assert generate_text(Generation.load(None, said)).startswith("The")

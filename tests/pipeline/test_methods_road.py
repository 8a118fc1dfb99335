"""The presets of a pretrained model, whole on Ray: all stages on documents, BitDistill on pairs."""

import json
from collections.abc import Callable

import pytest
import torch
from road import Road

from bitray import Config
from bitray.data import embedded, train_tokenizer
from bitray.models.loading import build_model, load_model, save_model
from bitray.nn import LowRankCorrection
from bitray.pipeline.run import run

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., list[str]]:
    """Words of a tiny run from a model that lies in a folder, with documents and pairs beside."""
    root = tmp_path_factory.mktemp("methods")
    texts = list(embedded.documents("prose", max_bytes=60_000))
    parts = [part for text in texts for part in text.split("\n\n")]
    (root / "notes.jsonl").write_text("\n".join(json.dumps({"text": part}) for part in parts))
    pairs = [{"q": f"{a} plus {b} is", "a": f" {a + b}"} for a in range(12) for b in range(12)]
    (root / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    shape = {
        "model_type": "llama", "vocab_size": 300, "hidden_size": 64, "intermediate_size": 128,
        "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 128, "tie_word_embeddings": True,
    }  # fmt: skip
    torch.manual_seed(0)
    save_model(build_model(shape), str(root / "dense"), train_tokenizer(texts, 300))

    def of(experiment: str, source: str, *more: str) -> list[str]:
        return [
            "model=smollm2_135m", f"model.path={root / 'dense'}", "model.name=mine",
            "data=local", f"data.sources.mine.path={root / source}.jsonl",
            "data.split.validation=0.1", "data.split.probe=0.1",
            f"output_dir={root / 'runs'}", f"experiment={experiment}",
            "training.max_steps=6", "training.batch_size=2", "training.max_seq_length=64",
            "training.gradient_accumulation_steps=2", "training.log_every=1",
            "training.schedule.warmup_steps=1", "evaluation.rows=4", "report.max_new_tokens=8",
            "scaling.num_workers=2", *more,
        ]  # fmt: skip

    return of


def ran(words: list[str]) -> Road:
    config = Config.load(overrides=words)
    return Road(config, run(config))


@pytest.mark.parametrize("init", ["kaiming", "closed_form"])
def test_all_stages_of_a_pretrained_model(pretrained: Callable[..., list[str]], init: str) -> None:
    """Each takes its steps with its own terms; corrections are trained alone, on what Stage 3 left,
    and the final checkpoint is evaluated like any other."""
    more = ["pipeline=full", f"stages.lrc.lrc.init={init}", "stages.lrc.lrc.rank=4"]
    road = ran(
        pretrained(f"full_{init}", "notes", *more, "stages.stage1_9.lambda_warmup.warmup_steps=3")
    )
    terms = {
        "stage1_9": ["continue_pretrain", "logits_distill", "hidden_distill"],
        "stage2": ["continue_pretrain"],
        "stage3": ["continue_pretrain", "logits_distill", "attention_distill"],
        "lrc": ["hidden_distill"],
    }
    for stage, names in terms.items():
        for name in names:
            assert len(road.metrics(stage, f"train/{name}_loss")) == 6, (stage, name)
    before, after = load_model(road.final("stage3")), load_model(road.final("lrc"))
    held = after.state_dict()
    assert all(torch.equal(value, held[name]) for name, value in before.state_dict().items())
    corrections = [m for m in after.modules() if isinstance(m, LowRankCorrection)]
    assert len(corrections) == 3 * 7
    assert all(m.u.abs().max() > 0 for m in corrections)
    losses = road.metrics("lrc", "train/hidden_distill_loss")
    assert losses[-1] < losses[0]


def test_bitdistill_on_prompts_and_completions(pretrained: Callable[..., list[str]]) -> None:
    """Only completions are trained on; the teacher is the model before it was made ternary."""
    pair = ["data.sources.mine.prompt='{q}'", "data.sources.mine.completion='{a}'"]
    road = ran(pretrained("pairs", "pairs", "pipeline=bitdistill", *pair))
    for name in ("continue_pretrain", "logits_distill", "attention_distill"):
        found = road.metrics("stage3", f"train/{name}_loss")
        assert len(found) == 6
        assert all(value > 0 for value in found), name
    shares = road.metrics("stage3", "train/label_share")
    assert min(shares) > 0, "completions are trained on"
    assert max(shares) < 0.6, "prompts are not"

"""The presets of a pretrained model, whole on Ray: all stages on documents, BitDistill on pairs."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from road import Road

from bitray import Config
from bitray.data import embedded, train_tokenizer
from bitray.models.loading import build_model, load_model, save_model
from bitray.nn import LowRankCorrection
from bitray.pipeline.run import run

ROOT = Path(__file__).parents[2]
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


MOODS = {"fine": " good", "lovely": " good", "warm": " good", "dull": " bad", "awful": " bad"}


def asked(numbers: range) -> list[dict[str, str]]:
    """Reviews whose mood is to be told, and words that are to be said again."""
    return [
        {"prompt": f"review {n}: it was {word}, so it was", "completion": mood}
        for n in numbers
        for word, mood in MOODS.items()
    ] + [
        {"prompt": f"review {n}: say {word}:", "completion": f" it is {word} and {word}"}
        for n in numbers
        for word in MOODS
    ]


def test_what_was_fine_tuned_on_pairs_answers_others_like_them(
    pretrained: Callable[..., list[str]], tmp_path: Path
) -> None:
    """A ternary model, two workers; then accuracy of choosing and ROUGE of writing, by the job, on
    numbers that it has not seen."""
    held_out = asked(range(60, 64))
    files = {
        "seen": asked(range(60)),
        "mood": [row for row in held_out if row["prompt"].endswith("it was")],
        "say": [row for row in held_out if row["prompt"].endswith(":")],
    }
    for name, rows in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    road = ran([
        *pretrained("tuned", "notes", "pipeline=direct"),
        "training.objectives={continue_pretrain: {weight: 1.0}}",
        f"data.sources.mine.path={tmp_path / 'seen.jsonl'}",
        "data.sources.mine.prompt='{prompt}'", "data.sources.mine.completion='{completion}'",
        "training.max_steps=240", "training.batch_size=8", "training.optimizer.lr=5e-3",
        "training.log_every=40",
    ])  # fmt: skip
    job = subprocess.run(
        [
            sys.executable, "jobs/evaluate.py", f"checkpoint={road.folder}",
            f"tasks.mood.path={tmp_path / 'mood.jsonl'}",
            "tasks.mood.choices=[' good', ' bad']",
            f"tasks.say.path={tmp_path / 'say.jsonl'}", "tasks.say.max_new_tokens=24",
        ],
        cwd=ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert job.returncode == 0, job.stderr
    told = [line.split() for line in job.stdout.splitlines() if line.startswith(("mood", "say"))]
    found = {f"{task} {metric}": float(value) for task, metric, value in told}
    assert found["mood majority"] == 0.6 and found["mood accuracy"] >= 0.95
    assert found["say rougeL"] >= 0.9

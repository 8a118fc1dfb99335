"""Tasks against plain transformers: a token at a time, one completion after the other."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitray.data.tokenizer import train_tokenizer
from bitray.inference import LMEval, Sampling, Task, generate
from bitray.inference.downstream import ask, lm_eval, rouge
from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.models.losses import LossModel, Term
from bitray.nn import set_strength, strength_of
from bitray.objectives import ContinuePretrain
from bitray.settings import UserError

CHOICES = (" good", " bad", " neither of them", " one")
PROMPTS = [f"review {k}: so it was {w}" for k, w in enumerate(["fine", "dull", "long", "odd"] * 2)]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(["a good review and a bad one, neither of them fine\n"] * 3, 285)


@pytest.fixture
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    config = {
        "model_type": "llama", "vocab_size": 285, "hidden_size": 32, "intermediate_size": 64,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
        "max_position_embeddings": 64, "initializer_range": 0.3,
    }  # fmt: skip
    return to_bitnet(build_model(config), "paper")


def write(path: Path, rows: list[dict[str, object]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@torch.no_grad()
def likelihood(model: PreTrainedModel, prompt: list[int], answer: list[int]) -> float:
    """A forward for each token."""
    total = 0.0
    for k, token in enumerate(answer):
        logits = model(torch.tensor([[*prompt, *answer[:k]]]), use_cache=False).logits[0, -1]
        total += float(logits.double().log_softmax(-1)[token])
    return total


def test_the_likeliest_completion_is_chosen(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    ids = {text: tokenizer(text)["input_ids"] for text in (*PROMPTS, *CHOICES)}
    expected, scores = [], {}
    for prompt in PROMPTS:
        scores[prompt] = [likelihood(model, ids[prompt], ids[c]) for c in CHOICES]
    best = {p: max(range(4), key=lambda c: scores[p][c]) for p in PROMPTS}
    per_character = {
        p: max(range(4), key=lambda c: scores[p][c] / len(CHOICES[c])) for p in PROMPTS
    }
    answers = [best[p] if k % 4 else (best[p] + 1) % 4 for k, p in enumerate(PROMPTS)]
    rows = [{"prompt": p, "completion": CHOICES[a]} for p, a in zip(PROMPTS, answers, strict=True)]
    expected = {
        "rows": 8,
        "accuracy": 0.75,
        "accuracy_norm": sum(per_character[p] == a for p, a in zip(PROMPTS, answers, strict=True))
        / 8,
        "majority": max(answers.count(c) for c in range(4)) / 8,
    }
    set_strength(model, 0.25)
    task = Task(path=write(tmp_path / "t.jsonl", rows), choices=CHOICES)
    assert ask(model, tokenizer, "t", task) == pytest.approx(expected)
    assert strength_of(model) == 0.25, "training goes on as before"
    assert len(set(best.values())) > 1, "a model that always says the same shows little"


def test_labels_are_choices_and_columns_may_have_any_name(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    rows = [{"text": p, "label": k % 2} for k, p in enumerate(PROMPTS)]
    named = [{"prompt": p, "completion": [" bad", " good"][k % 2]} for k, p in enumerate(PROMPTS)]
    one = Task(
        path=write(tmp_path / "a.jsonl", rows), prompt="{text}", completion=" {label}",
        labels=("bad", "good"), rows=7,
    )  # fmt: skip
    other = Task(path=write(tmp_path / "b.jsonl", named), choices=(" bad", " good"), rows=7)
    found = ask(model, tokenizer, "one", one)
    assert found["rows"] == 7 and found == ask(model, tokenizer, "other", other)


def test_a_long_prompt_loses_its_beginning(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    long = "word " * 200 + PROMPTS[0]
    rows = [{"prompt": long, "completion": CHOICES[0]}]
    most = max(len(tokenizer(c)["input_ids"]) for c in CHOICES)
    kept = tokenizer(long)["input_ids"][-(64 - most) :]
    scores = [likelihood(model, kept, tokenizer(c)["input_ids"]) for c in CHOICES]
    task = Task(path=write(tmp_path / "t.jsonl", rows), choices=CHOICES)
    assert ask(model, tokenizer, "t", task)["accuracy"] == float(max(scores) == scores[0])


def test_fine_tuning_on_pairs_teaches_the_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    """Half of the pairs are trained on as training does, prompts masked; the others are asked."""
    pairs = [
        (f"{k} a fine {word} thing:", f" {mood}")
        for k in range(40)
        for word, mood in (("review", "good"), ("one", "bad"))
    ]
    task = Task(
        path=write(tmp_path / "t.jsonl", [{"prompt": p, "completion": c} for p, c in pairs[40:]]),
        choices=(" good", " bad"),
    )
    assert ask(model, tokenizer, "t", task)["accuracy"] < 0.8
    ids = [[tokenizer(text)["input_ids"] for text in pair] for pair in pairs[:40]]
    width = max(len(p) + len(c) for p, c in ids)
    rows = np.array([p + c + [0] * (width - len(p) - len(c)) for p, c in ids])
    batch = Batch.from_rows(
        rows, [[len(p) + len(c)] for p, c in ids], [0] * 40, [[len(p)] for p, _ in ids]
    )
    wrapped, objective = LossModel(model), ContinuePretrain()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(40):
        scale = 1 / objective.count(batch)
        wrapped(batch, [Term("ce", objective, scale)])[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert ask(model, tokenizer, "t", task)["accuracy"] > 0.95


def test_written_text_is_compared_with_the_right_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    greedy = Sampling(temperature=0, max_new_tokens=12)
    texts = [generate(model, tokenizer, prompt, greedy) for prompt in PROMPTS[:3]]
    answers = [texts[0], "good " + texts[1], "nothing alike"]
    rows = [{"prompt": p, "completion": f"{a} x"} for p, a in zip(PROMPTS, answers, strict=False)]
    task = Task(path=write(tmp_path / "t.jsonl", rows), max_new_tokens=12)
    found = ask(model, tokenizer, "t", task)
    scores = [rouge(t, f"{a} x") for t, a in zip(texts, answers, strict=True)]
    for metric in ("rouge1", "rouge2", "rougeL"):
        assert found[metric] == pytest.approx(sum(score[metric] for score in scores) / 3)


# Lin 2004, section 3: S1 is the reference; S2 shares police, the gunman and S3 only the gunman.
@pytest.mark.parametrize(
    ("text", "reference", "one", "two", "longest"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4, 1 / 3, 3 / 4),
        ("the gunman kill police", "police killed the gunman", 3 / 4, 1 / 3, 2 / 4),
        ("the gunman police killed", "police killed the gunman", 1.0, 2 / 3, 2 / 4),
        ("The cat!", "the CAT, sat", 2 * 2 / 5, 2 * 1 / 3, 2 * 2 / 5),
        ("a a a b", "a b", 2 * 2 / 6, 2 * 1 / 4, 2 * 2 / 6),
        ("", "the cat", 0.0, 0.0, 0.0),
        ("the", "the", 1.0, 0.0, 1.0),
    ],
)
def test_rouge_of_known_pairs(
    text: str, reference: str, one: float, two: float, longest: float
) -> None:
    expected = {"rouge1": one, "rouge2": two, "rougeL": longest}
    assert rouge(text, reference) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("rows", "settings", "told"),
    [
        ([{"prompt": "a", "completion": " so"}], {"choices": CHOICES}, "answers ' so', which is"),
        ([{"prompt": "a"}], {}, r"t\.jsonl:1: no column 'completion'"),
        ([], {}, "has no row to ask"),
        ([{"prompt": "a", "completion": "b"}], {"max_new_tokens": 64}, "64 positions"),
    ],
)
def test_a_task_that_cannot_be_asked_is_one_sentence(  # noqa: PLR0917 - columns of the table
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path,
    rows: list[dict[str, object]], settings: dict[str, object], told: str,
) -> None:  # fmt: skip
    task = Task(path=write(tmp_path / "t.jsonl", rows), **settings)
    with pytest.raises(UserError, match=told):
        ask(model, tokenizer, "mine", task)


# ------------------------------------------------------------------------------------------ lm-eval

TASK = """
task: mood
dataset_path: json
dataset_kwargs: {data_files: {test: FILE}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{prompt}}"
doc_to_target: "{{label}}"
doc_to_choice: ["good", "bad"]
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def test_lm_eval_finds_the_same_on_a_local_task(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    labels = [int(k % 3 == 0) for k in range(len(PROMPTS))]
    rows: list[dict[str, object]] = [
        {"prompt": p, "label": a, "completion": (" good", " bad")[a]}
        for p, a in zip(PROMPTS, labels, strict=True)
    ]
    file = write(tmp_path / "mood.jsonl", rows)
    (tmp_path / "mood.yaml").write_text(TASK.replace("FILE", file))
    wanted = LMEval(tasks=("mood",), include_path=str(tmp_path))
    set_strength(model, 0.25)
    (theirs,) = list(lm_eval(model, tokenizer, wanted, 4))
    assert strength_of(model) == 0.25
    ours = ask(model, tokenizer, "mood", Task(path=file, choices=(" good", " bad")))
    assert theirs == ("mood", "acc", pytest.approx(ours["accuracy"]))
    with pytest.raises(UserError, match=r"no task 'moood' \(nearest: 'mood'\)"):
        list(lm_eval(model, tokenizer, wanted.model_copy(update={"tasks": ("moood",)}), 4))


def test_without_lm_eval_it_is_named(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "lm_eval", None)
    with pytest.raises(UserError, match="lm-eval is not installed; pip install lm-eval"):
        list(lm_eval(model, tokenizer, LMEval(tasks=("mood",)), 4))

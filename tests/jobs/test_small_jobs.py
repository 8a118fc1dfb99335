"""The jobs around a run: show its rows, evaluate, generate, export; on every kind of checkpoint."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import SMALL_MODEL, SMALL_STAGES, Command, tree
from gguf import GGUFReader
from transformers import AutoModelForCausalLM

from bitray.data.settings import HeldOut
from bitray.data.units import split_of
from bitray.inference import Diffusion, Sampling, Task, evaluate, generate, perplexity
from bitray.inference.downstream import ask
from bitray.models.batch import Batch
from bitray.models.loading import load_model, load_tokenizer, save_model
from bitray.models.losses import LossModel
from bitray.models.mask_token import add_mask_token
from bitray.training.loop import autocast_for

GREEDY = ["sampling.temperature=0", "sampling.max_new_tokens=6"]


def places(run_dir: str, models: Path) -> dict[str, str]:
    """Ways to say where a model is."""
    stage = f"{run_dir}/stage2_checkpoint"
    return {
        "a run": run_dir,
        "a stage": stage,
        "its checkpoints": f"{stage}/checkpoints",
        "a checkpoint": f"{stage}/checkpoints/final",
        "the newest step of a stage that goes on": f"{run_dir}/stage1_9_checkpoint",
        "a step": f"{run_dir}/stage1_9_checkpoint/checkpoints/step_000002",
        "a folder of save_model": str(models / "ternary"),
        "a Hugging Face folder": str(models / "dense"),
    }


# ---------------------------------------------------------------------------------------- generate


def test_text_comes_from_every_kind_of_checkpoint(
    command: Command, run_dir: str, models: Path
) -> None:
    """And it is the library's own: the same model, prompt and settings."""
    for kind, place in places(run_dir, models).items():
        done = command("generate", f"checkpoint={place}", "prompt=The function", *GREEDY)
        assert done.code == 0, (kind, done.err)
        assert done.err == "" and done.out.startswith("The function"), kind
        assert done.out.strip() != "The function", kind
    model, tokenizer = load_model(str(models / "dense")), load_tokenizer(str(models / "dense"))
    greedy = Sampling(temperature=0, max_new_tokens=6)
    assert done.out == f"The function{generate(model, tokenizer, 'The function', greedy)}\n"


def test_a_relative_folder_and_a_seed(command: Command, here: Path, models: Path) -> None:
    (here / "mine").symlink_to(models / "ternary")
    words = ["checkpoint=mine", "prompt=a", "sampling.max_new_tokens=8", "sampling.top_k=0"]
    first, again, other = (command("generate", *words, f"sampling.seed={k}") for k in (1, 1, 2))
    assert first.out == again.out != other.out


def test_block_diffusion_of_a_model_with_a_mask_token(
    command: Command, here: Path, models: Path
) -> None:
    model, tokenizer = load_model(str(models / "ternary")), load_tokenizer(str(models / "ternary"))
    add_mask_token(model, tokenizer)
    save_model(model, str(here / "masked"), tokenizer)
    words = ["checkpoint=masked", "prompt=The function", "mode=diffusion", *GREEDY]
    greedy = Sampling(temperature=0, max_new_tokens=6)
    for how in Diffusion(), Diffusion(strategy="iterative", steps=2, block=4):
        said = [f"diffusion.{key}={value}" for key, value in how.model_dump().items() if value]
        done = command("generate", *words, *said)
        assert done.code == 0, done.err
        assert done.out.strip() != "The function"
        expected = generate(model, tokenizer, "The function", greedy, how)
        assert done.out == f"The function{expected}\n"


# ------------------------------------------------------------------------------------------ export


def test_gguf_from_every_kind_of_ternary_checkpoint(
    command: Command, here: Path, run_dir: str, models: Path
) -> None:
    """i2_s by default, and nothing but the file is written."""
    kinds = places(run_dir, models)
    for kind in ("a run", "a stage", "a checkpoint", "a folder of save_model"):
        done = command("export", f"checkpoint={kinds[kind]}", "format=gguf", "output=out/m.gguf")
        assert done.code == 0, (kind, done.err)
        assert "out/m.gguf: i2_s as llama" in done.out and "0 mismatches" in done.out
        assert sorted(tree(here)) == ["out", "out/m.gguf"]
        (here / "out" / "m.gguf").unlink()
    command("export", f"checkpoint={run_dir}", "format=gguf", "type=tq2_0", "output=m.gguf")
    types = {tensor.tensor_type.name for tensor in GGUFReader(here / "m.gguf").tensors}
    assert "TQ2_0" in types


def test_a_hugging_face_folder_that_stock_transformers_loads(
    command: Command, here: Path, run_dir: str, models: Path
) -> None:
    words = ["format=huggingface", "output=hf"]
    assert command("export", f"checkpoint={models / 'ternary'}", *words).code == 0
    ids = torch.arange(20)[None]
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(here / "hf")(ids).logits
        ours = load_model(str(models / "ternary"))(ids).logits
    assert torch.allclose(theirs, ours, rtol=1e-4, atol=1e-4)
    done = command("export", f"checkpoint={run_dir}", *words)  # over the older export
    assert done.code == 0, done.err
    card = (here / "hf" / "README.md").read_text()
    assert "books" in card and "stage2" in card, "the recipe is known where there is a run"


# --------------------------------------------------------------------------------- evaluate, tasks


def test_tasks_are_asked_and_nothing_is_prepared(
    command: Command, here: Path, models: Path
) -> None:
    """Choices and written text, from every kind of checkpoint; the figures are the library's."""
    rows = [{"q": f"Is {k} even?", "a": k % 2} for k in range(6)]
    (here / "even.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (here / "say.jsonl").write_text(json.dumps({"prompt": "Say it", "completion": " again"}))
    words = ["tasks.even.path=even.jsonl", "tasks.even.prompt='{q}'",
             "tasks.even.completion=' {a}'", "tasks.even.labels=['yes', 'no']",
             "tasks.say.path=say.jsonl", "tasks.say.max_new_tokens=5"]  # fmt: skip
    done = command("evaluate", f"checkpoint={models / 'ternary'}", *words)
    assert done.code == 0, done.err
    cells = [line.split() for line in done.out.splitlines()[2:]]
    found = {(task, metric): float(value) for task, metric, value in cells}
    assert found["even", "rows"] == 6 and found["even", "majority"] == 0.5
    task = Task(path=str(here / "even.jsonl"), prompt="{q}", completion=" {a}",
                labels=("yes", "no"))  # fmt: skip
    place = str(models / "ternary")
    expected = ask(load_model(place), load_tokenizer(place), "even", task)
    for metric, value in expected.items():
        assert found["even", metric] == pytest.approx(value, abs=1e-4)
    assert {metric for task, metric in found if task == "say"} == {
        "rows", "rouge1", "rouge2", "rougeL"
    }  # fmt: skip
    assert sorted(tree(here)) == ["even.jsonl", "say.jsonl"]


# ------------------------------------------------------------------------- evaluate, with Ray Data


@pytest.mark.ray
@pytest.mark.usefixtures("ray_cluster")
class TestWithRay:
    """What has to prepare rows."""

    def test_the_losses_of_a_run_on_its_own_data(
        self, command: Command, here: Path, run_dir: str
    ) -> None:
        """Prepared beside the run, not here; a second time found; and they are the library's."""
        done = command("evaluate", f"checkpoint={run_dir}", "rows=8")
        assert done.code == 0, done.err
        name, rows, loss, ppl = done.out.splitlines()[-2].split()
        assert (name, rows) == ("books", "8")
        assert abs(float(ppl) - perplexity(float(loss))) < 0.01 * float(ppl)
        assert tree(here) == {}
        again = command("evaluate", f"checkpoint={run_dir}", "rows=8")
        assert again.out.splitlines()[-2:] == done.out.splitlines()[-2:]
        assert "prepare" not in again.out

    def test_any_model_on_any_data(
        self, command: Command, here: Path, models: Path, corpus: str
    ) -> None:
        words = [f"checkpoint={models / 'dense'}", "data=local", "data.split.validation=0.2"]
        words += [f"data.sources.mine.path={corpus}", "max_seq_length=32", "rows=4"]
        done = command("evaluate", *words)
        assert done.code == 0, done.err
        loss = float(done.out.splitlines()[-2].split()[2])
        assert 0.9 * 5.7 < loss < 1.2 * 5.7, "an untrained model guesses among 300 tokens"
        assert [path.name for path in (here / "runs").iterdir()] == ["prepared"]

    def test_evaluated_alike_here_and_by_the_library(
        self, command: Command, here: Path, models: Path, corpus: str
    ) -> None:
        """One document a row, so that the rows are known without the packing."""
        (here / "one.jsonl").write_text("".join(
            json.dumps({"text": f"number {k} of a few"}) + "\n" for k in range(40)))  # fmt: skip
        words = ["data=local", "data.sources.one.path=one.jsonl", "data.open_bins=0"]
        words += ["data.split.validation=0.5", "data.split.probe=0", "max_seq_length=32"]
        done = command("evaluate", f"checkpoint={models / 'ternary'}", *words)
        assert done.code == 0, done.err
        model = load_model(str(models / "ternary"))
        tokenizer = load_tokenizer(str(models / "ternary"))
        texts = [f"number {k} of a few" for k in range(40)]
        held = HeldOut(validation=0.5, probe=0)
        ids = [[*tokenizer(t)["input_ids"], tokenizer.eos_token_id] for t in texts
               if split_of(t, held) == "validation"]  # fmt: skip
        rows = np.array([one + [0] * (32 - len(one)) for one in ids])
        batch = Batch.from_rows(rows, [[len(one)] for one in ids], [0] * len(ids))
        device = torch.device("cpu")
        found = evaluate(LossModel(model), {"one": [batch]}, device, autocast_for(device, "auto"))
        assert abs(float(done.out.splitlines()[-2].split()[2]) - found["one"]) < 1e-3

    def test_rows_are_shown_as_training_sees_them(
        self, command: Command, here: Path, models: Path
    ) -> None:
        """Borders of documents, what is learnt of each, and the text itself."""
        (here / "two.jsonl").write_text('{"text": "first one"}\n{"text": "second\\ndocument"}\n')
        words = [*SMALL_MODEL, *SMALL_STAGES, f"model.tokenizer={models / 'dense'}", "data=local",
                 "data.sources.two.path=two.jsonl", "data.split.validation=0",
                 "data.split.probe=0"]  # fmt: skip
        tokenizer = load_tokenizer(str(models / "dense"))
        one, two = (len(tokenizer(t)["input_ids"]) + 1 for t in ("first one", "second\ndocument"))
        done = command("prepare", *words, "--preview", "2")
        assert done.code == 0, done.err
        shown = done.out[done.out.index("rows as training sees them") :]
        assert f"--- two, row 0: 2 documents, {one + two} tokens, {64 - one - two} of pad" in shown
        assert f"document 1: {one} tokens, {one - 1} learnt" in shown
        assert f"document 2: {two} tokens, {two - 1} learnt" in shown
        first = tokenizer.decode(tokenizer("first one")["input_ids"][:1])
        assert f"    ⟦{first}⟧{'first one'.removeprefix(first)}<|endoftext|>" in shown
        assert "\n    document<|endoftext|>" in shown, "lines stay lines, indented"
        assert "row 1" not in shown, "there is only one"
        quiet = command("prepare", *words)
        assert "training sees" not in quiet.out and "prepare:" not in quiet.out

    def test_a_prompt_is_shown_in_brackets_and_near_duplicates_in_a_table(
        self, command: Command, here: Path, models: Path
    ) -> None:
        rows = [{"q": "What is it?", "a": "All the same."}, {"q": "What is it?", "a": "No"}]
        (here / "qa.jsonl").write_text("\n".join(map(json.dumps, rows)))
        (here / "qa2.jsonl").write_text(json.dumps({"q": "What is it?", "a": "all the same!"}))
        words = [*SMALL_MODEL, *SMALL_STAGES, f"model.tokenizer={models / 'dense'}", "data=local",
                 "data.split.validation=0", "data.split.probe=0", "data.overlap.enabled=true",
                 "data.overlap.ngram=2"]  # fmt: skip
        for name in ("qa", "qa2"):
            source = {"path": f"{name}.jsonl", "prompt": "'{q}'", "completion": "' {a}'"}
            words += [f"data.sources.{name}.{key}={value}" for key, value in source.items()]
        done = command("prepare", *words, "--preview", "1")
        assert done.code == 0, done.err
        assert "    ⟦What is it?⟧ All the same.<|endoftext|>" in done.out
        table = [line.split() for line in done.out.splitlines()]
        assert ["qa", "0.00%", "50.00%"] in table and ["qa2", "100.00%", "0.00%"] in table
        assert "'What is it? all the same!'" in done.out

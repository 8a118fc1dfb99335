"""The equivalence tool: it sees no difference where there is none, and every one that there is."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from compare_runs import Found, compared, configured, cosine, measured

from bitray.settings import UserError

ROOT = Path(__file__).parent.parent

TINY = [
    "model.config.vocab_size=64", "model.config.hidden_size=32",
    "model.config.intermediate_size=64", "model.config.num_attention_heads=2",
    "model.config.num_key_value_heads=1", "training.max_seq_length=24",
    "training.batch_size=2", "training.gradient_accumulation_steps=2",
    "model.quantization.subln=paper", "scaling.num_workers=1",
]  # fmt: skip


def numbers(stage: str, *words: str) -> Found:
    return measured(configured([*TINY, *words], stage), stage, 3)


@pytest.fixture(scope="module")
def plain() -> Found:
    return numbers("stage1_9")


@pytest.mark.parametrize(
    ("words", "tolerance"),
    [
        (["training.activation_checkpointing=true"], 0),
        (["model.teacher.type=offload"], 0),
        (["training.logits_chunk=7"], 1e-6),
    ],
)
def test_what_must_change_nothing_changes_nothing(
    words: list[str], tolerance: float, plain: Found
) -> None:
    """Losses, hidden states, logits and gradients of Stage 1.9: all kinds of objectives."""
    for difference in compared(plain, numbers("stage1_9", *words)):
        assert difference.within(max(tolerance, 1e-12)), difference


def test_two_workers_with_a_sharded_teacher_change_nothing(plain: Found) -> None:
    words = ["scaling.num_workers=2", "model.teacher.layout=sharded"]
    for difference in compared(plain, numbers("stage1_9", *words)):
        assert difference.within(1e-6), difference


@pytest.mark.slow
@pytest.mark.usefixtures("unchecked")
def test_compiled_blocks_change_nothing(plain: Found) -> None:
    for difference in compared(plain, numbers("stage1_9", "training.torch_compile.enabled=true")):
        assert difference.within(1e-5), difference


def test_the_kernels_of_integers_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Int8 hardware, or floats over integers."""
    found = []
    for int8_hardware in (True, False):
        monkeypatch.setattr("bitray.nn.product._VNNI", int8_hardware)
        found.append(numbers("stage2", "stages.stage2.lambda_warmup.warmup_steps=0"))
    for difference in compared(*found):
        assert difference.within(1e-12), difference


CORRECTED = ["stages.stage2.lrc.rank=4", "export.gguf=[]", "export.huggingface=false"]


@pytest.mark.parametrize("more", [[], ["stages.stage2.lrc.init=svd"]])
def test_low_rank_corrections_are_compared(more: list[str]) -> None:
    found = numbers("stage2", *CORRECTED, *more)
    assert all(name.endswith((".u", ".v")) for name in found.gradients) and found.gradients
    recomputed = numbers("stage2", *CORRECTED, *more, "training.activation_checkpointing=true")
    for difference in compared(found, recomputed):
        assert difference.within(1e-12), difference
    for other in (numbers("stage2"), numbers("stage2", *CORRECTED, "stages.stage2.lrc.rank=3")):
        differences = {each.what: each for each in compared(found, other)}
        assert not differences["gradients"].within(0.5)
        assert differences["gradients"].worst.endswith("not the same kind of thing in both")


def test_block_diffusion_is_compared(plain: Found) -> None:
    words = ["stages.stage2.objectives.dlm={weight: 1, block: 8}"]
    found = numbers("stage2", *words)
    for difference in compared(found, numbers("stage2", *words, "training.logits_chunk=7")):
        assert difference.within(1e-5), difference
    differences = {each.what: each for each in compared(numbers("stage2"), found)}
    assert not differences["logits"].within(0.5), "a mask token more"


def test_what_cannot_be_compared_is_one_sentence_from_any_process() -> None:
    with pytest.raises(UserError, match=r"hybrid needs several nodes.* 2 on this node: take full"):
        numbers("stage2", "scaling.num_workers=2", "scaling.sharding=hybrid")
    done = script(*TINY, "training=stage2_pretrain", "model.teacher.type=actors", "--steps", "1")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("model.teacher: a remote one cannot be compared")
    assert "Traceback" not in done.stderr


def made(**changes: Any) -> Found:
    torch.manual_seed(0)
    found = Found(
        {"logits": torch.randn(4, 5)}, {"layer 0": torch.randn(3)},
        {"a": torch.randn(7), "b": torch.randn(2, 2)}, [3.0, 2.0],
    )  # fmt: skip
    for name, value in changes.items():
        setattr(found, name, value)
    return found


def test_the_worst_is_told() -> None:
    other = made()
    other.gradients["b"] = torch.tensor([[-1.0, 0], [0, 0]]) + other.gradients["b"]
    other.losses = [3.0, 2.5]
    logits, hidden, gradients, losses = compared(made(), other)
    assert logits.within(1e-9) and hidden.within(1e-9)
    assert not gradients.within(1e-3) and gradients.worst == "b"
    assert losses.worst == "step 2" and losses.relative == pytest.approx(0.25)
    assert losses.within(0.26) and not losses.within(0.24)


def test_what_is_no_number_is_never_the_same() -> None:
    other = made(hidden={"layer 0": torch.full((3,), torch.nan)}, losses=[3.0, float("nan")])
    differences = {each.what: each for each in compared(made(), other)}
    assert not differences["hidden"].within(10) and not differences["losses"].within(10)
    assert (
        cosine(torch.zeros(3), torch.zeros(3)) == 1 and cosine(torch.zeros(3), torch.ones(3)) == 0
    )


def script(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, ROOT / "scripts" / "compare_runs.py", *words],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def test_exit_status_says_whether_they_are_the_same() -> None:
    words = ["--stage", "stage0", "--steps", "2", "--json", "--tolerance", "1e-7"]
    done = script(*TINY, *words, "--b", "training.precision=bf16")
    assert done.returncode == 1, done.stderr
    told = json.loads(done.stdout)
    assert not told["same"]
    assert [each["what"] for each in told["differences"]] == [
        "logits",
        "hidden",
        "gradients",
        "losses",
    ]
    assert 1e-6 < 1 - told["differences"][0]["cosine"] < 1e-2, "bf16 is near fp32, and not it"


def test_a_stage_that_is_not_there_is_one_sentence() -> None:
    done = script("--stage", "stage9")
    assert done.returncode == 2
    assert done.stderr == "--stage stage9: this pipeline trains stage0, stage1_9, stage2\n"

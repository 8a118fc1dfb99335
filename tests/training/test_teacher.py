"""Teachers wherever their weights lie say what the plain model says."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedModel

from bitray.models.batch import Batch
from bitray.models.families import decoder_layers
from bitray.models.loading import build_model, save_model
from bitray.models.losses import TeacherOutput, run_teacher
from bitray.settings import UserError
from bitray.training.loop import autocast_for
from bitray.training.teacher import InProcessTeacher, offload, open_teacher, top_k_of
from bitray.training.teacher_settings import FourBit, InProcess, Offload

CPU = torch.device("cpu")
EXACT = autocast_for(CPU, "fp32")


def make_model(layers: int = 3, width: int = 128) -> PreTrainedModel:
    torch.manual_seed(4)
    return build_model({
        "model_type": "llama", "vocab_size": 61, "hidden_size": 64, "intermediate_size": width,
        "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2,
    }).requires_grad_(False).eval()  # fmt: skip


def make_batch() -> Batch:
    ids = np.random.default_rng(1).integers(0, 61, (3, 24)).astype(np.int32)
    return Batch.from_rows(ids, [[10, 12], [24], [3]], [0, 0, 0])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = str(tmp_path_factory.mktemp("teacher"))
    save_model(make_model(), path)
    return path


def same(got: TeacherOutput, expected: TeacherOutput) -> None:
    assert got.layers is not None and expected.layers is not None
    for a, b in zip([got.hidden, got.head, *got.layers],
                    [expected.hidden, expected.head, *expected.layers], strict=True):  # fmt: skip
        assert torch.equal(a, b)


# ------------------------------------------------------------------------------------- offloaded


@pytest.mark.parametrize("layers", [1, 2, 5])
def test_an_offloaded_teacher_says_the_same_again_and_again(layers: int) -> None:
    """An odd number of layers brings the first one where the last one has just been."""
    plain, moved = make_model(layers), make_model(layers)
    offload(moved, CPU)
    for seed in range(3):
        batch = make_batch()
        batch.input_ids[:] = torch.randint(0, 61, batch.input_ids.shape)
        torch.manual_seed(seed)
        same(run_teacher(moved, batch, True), run_teacher(plain, batch, True))


def test_no_more_than_two_layers_are_on_the_device() -> None:
    model = make_model(6)
    offload(model, CPU)
    layers = decoder_layers(model)

    def addresses() -> list[int]:
        return [next(iter(layer.parameters())).data_ptr() for layer in layers]

    home, seen = addresses(), []
    for layer in layers:
        layer.mlp.register_forward_hook(lambda *_: seen.append(addresses()))
    run_teacher(model, make_batch(), False)
    assert len(seen) == 6
    for at, now in enumerate(seen):
        assert [here for here, (a, b) in enumerate(zip(now, home, strict=True)) if a != b] == [at]
    assert len({now[at] for at, now in enumerate(seen)}) == 2, "two places, taken in turn"
    assert addresses() == home


def test_the_next_layer_is_on_its_way_while_one_computes() -> None:
    model = make_model(4)
    offload(model, CPU)
    layers, order = decoder_layers(model), []
    copy = Tensor.copy_

    def noted(self: Tensor, *args: object, **kwargs: object) -> Tensor:
        order.append("copy")
        return copy(self, *args, **kwargs)  # type: ignore[arg-type]

    for at, layer in enumerate(layers):
        layer.mlp.register_forward_hook(lambda *_, at=at: order.append(at))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "copy_", noted)
        run_teacher(model, make_batch(), False)
    assert order == ["copy", "copy", 0, "copy", 1, "copy", 2, "copy", 3], "the last: for next time"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_an_offloaded_teacher_on_a_gpu() -> None:
    device = torch.device("cuda")
    plain, moved = make_model(5).to(device), make_model(5)  # type: ignore[arg-type]
    offload(moved, device)
    batch = make_batch().to(device)
    for _ in range(5):
        same(run_teacher(moved, batch, True), run_teacher(plain, batch, True))


# ----------------------------------------------------------------------------------------- 4 bits


@pytest.mark.parametrize("double_quant", [True, False])
def test_four_bits_are_those_of_transformers(folder: str, double_quant: bool) -> None:
    settings = FourBit(double_quant=double_quant)
    teacher = open_teacher(settings, folder, CPU, EXACT)
    wanted = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32,
        bnb_4bit_use_double_quant=double_quant,
    )  # fmt: skip
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=wanted, device_map={"": "cpu"}, dtype=torch.float32
    )
    batch = make_batch()
    same(teacher(batch, True), run_teacher(theirs.eval(), batch, True))
    assert decoder_layers(teacher.model)[0].mlp.up_proj.weight.dtype == torch.uint8
    far = (teacher(batch, False).hidden - run_teacher(make_model(), batch, False).hidden).std()
    assert 1e-3 < far < 0.5, "near the teacher, and not itself"


def test_sizes_that_four_bits_cannot_have_on_cpus_are_refused(tmp_path: Path) -> None:
    save_model(make_model(width=96), str(tmp_path))
    with pytest.raises(UserError, match=r"a multiple of 64; down_proj has 96; take in_process"):
        open_teacher(FourBit(), str(tmp_path), CPU, EXACT)


# ---------------------------------------------------------------------------------------- sharded


def sharded(folder: str) -> tuple[int, list[list[Any]]]:
    teacher = open_teacher(InProcess(layout="sharded"), folder, CPU, EXACT)
    held = sum(p.to_local().numel() for p in teacher.model.parameters())  # type: ignore[operator]
    answers = [teacher(make_batch(), True) for _ in range(2)]
    return held, [[a.hidden, a.head, *(a.layers or [])] for a in answers]


def test_a_sharded_teacher_says_the_same_on_two_workers(folder: str, tmp_path: Path) -> None:
    model, batch = make_model(), make_batch()
    expected = run_teacher(model, batch, True)
    whole = sum(p.numel() for p in model.parameters())
    found = ranks.run(sharded, tmp_path, folder)
    assert sum(held for held, _ in found) == whole
    for _, answers in found:
        for hidden, head, *layers in answers:
            same(TeacherOutput(hidden, head, layers), expected)


def test_size_decides_whether_it_is_sharded() -> None:
    auto = InProcess(shard_above=1e6)
    assert auto.sharded(2_000_000, 2) and not auto.sharded(500_000, 2)
    assert not auto.sharded(2_000_000, 1), "one worker has nobody to share with"
    assert InProcess(layout="sharded").sharded(10, 2)
    assert not InProcess(layout="replicated").sharded(10**12, 2)


# --------------------------------------------------------------------------------- what is sent


@pytest.mark.parametrize("k", [3, 61, 100])
@pytest.mark.parametrize("chunk", [5, 2048])
def test_the_likeliest_tokens_of_every_real_position(k: int, chunk: int) -> None:
    model, batch = make_model(), make_batch()
    found = top_k_of(InProcessTeacher(model, EXACT), batch, k, 2.0, chunk)
    k = min(k, 61)
    logits = model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False)
    for row, at in batch.real.nonzero().tolist():
        p = torch.softmax(logits.logits[row, at].double() / 2, -1)
        assert found.ids[row, at].tolist() == p.argsort(descending=True)[:k].tolist()
        kept = p[found.ids[row, at].long()]
        rest = [] if k == 61 else [1 - kept.sum()]
        expected = torch.stack([*kept, *rest]).float()
        torch.testing.assert_close(found.logp[row, at].exp(), expected, rtol=1e-4, atol=1e-6)


def test_settings_of_every_kind_are_tiny_things() -> None:
    for kind in (InProcess, Offload, FourBit):
        assert kind().path is None and not kind().remote

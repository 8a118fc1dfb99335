"""The chunked loss against plain transformers logits and plain torch losses."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from tiny_models import make_model
from torch import Tensor
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from bitray.models.batch import IGNORED, Batch
from bitray.models.convert import to_bitnet
from bitray.models.families import FAMILIES, decoder_layers
from bitray.models.losses import LossModel, TeacherOutput, Term, run_teacher
from bitray.models.packed import packed_inputs
from bitray.objectives import AttentionDistill, ContinuePretrain, HiddenDistill, LogitsDistill
from bitray.settings import UserError

CE = Term("ce", ContinuePretrain(), 0.03)
KL = Term("kl", LogitsDistill(temperature=2.0), 0.02)
HIDDEN = Term("hidden", HiddenDistill(loss_type="mse", layer_weights="uniform"), 0.5)


ATTENTION = Term("attention", AttentionDistill(), 0.4)


@pytest.fixture
def teacher() -> PreTrainedModel:
    return make_model(seed=1).eval().requires_grad_(False)


def _shifted(batch: Batch) -> tuple[Tensor, Tensor]:
    labels = batch.labels[:, 1:].flatten()
    return labels, labels != IGNORED


def plain_loss(model: PreTrainedModel, batch: Batch, teacher: PreTrainedModel | None) -> Tensor:
    """CE, and with a teacher KL and hidden states too, from whole logits by autograd."""
    outputs = model(**packed_inputs(batch), output_hidden_states=True)
    z = outputs.logits[:, :-1].flatten(0, 1)
    labels, learnt = _shifted(batch)
    loss = CE.scale * F.cross_entropy(z, labels, ignore_index=IGNORED, reduction="sum")
    if teacher is None:
        return loss
    theirs = teacher(**packed_inputs(batch), output_hidden_states=True)
    z_t = theirs.logits[:, :-1].flatten(0, 1)
    divergence = F.kl_div(
        F.log_softmax(z[learnt] / 2, -1),
        F.log_softmax(z_t[learnt] / 2, -1),
        log_target=True,
        reduction="sum",
    )
    # of the last layer transformers gives the output of the final norm, so only the first is here
    first, first_t = outputs.hidden_states[1][batch.real], theirs.hidden_states[1][batch.real]
    hidden = (first - first_t).square().mean(-1).sum() / len(decoder_layers(model))
    return loss + KL.scale * 4 * divergence + HIDDEN.scale * hidden


class FirstLayer(HiddenDistill):
    """What transformers can be compared with: the output of the first layer."""

    def on_layer(self, index: int, *inputs: Any) -> tuple[Tensor, dict[str, Tensor]]:
        loss, reported = super().on_layer(index, *inputs)
        return loss * (index == 0), reported


FIRST = Term("hidden", FirstLayer(loss_type="mse", layer_weights="uniform"), HIDDEN.scale)


def _gradients(loss: Tensor, model: torch.nn.Module) -> list[Tensor]:
    model.zero_grad()
    loss.backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_cross_entropy_is_that_of_transformers(model_type: str, tied: bool, batch: Batch) -> None:
    model = to_bitnet(make_model(model_type, tie_word_embeddings=tied))
    loss, metrics = LossModel(model, chunk_tokens=7)(batch, [CE])
    expected = plain_loss(model, batch, None)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(metrics["ce/sum"] * CE.scale, expected)
    got, wanted = _gradients(loss, model), _gradients(expected, model)
    assert len(got) == len(list(model.parameters()))
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("chunk_tokens", [1, 13, 2048])
def test_all_terms_together_whatever_the_chunk(
    teacher: PreTrainedModel, batch: Batch, chunk_tokens: int
) -> None:
    model = to_bitnet(make_model())
    told = run_teacher(teacher, batch, layers=True)
    loss, metrics = LossModel(model, chunk_tokens)(batch, [CE, KL], [FIRST], told)
    expected = plain_loss(model, batch, teacher)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(
        _gradients(loss, model), _gradients(expected, model), rtol=1e-4, atol=1e-6
    )
    assert set(metrics) == {"ce/sum", "ce/nll", "kl/sum", "hidden/sum", "hidden/cosine"}
    assert not any(value.requires_grad for value in metrics.values())


class Largest(TorchDispatchMode):
    """The most elements that any tensor with a vocabulary-sized axis has had, and of which rows."""

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.vocabulary, self.rows = vocabulary, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor) and leaf.ndim and leaf.shape[-1] == self.vocabulary:
                self.rows = max(self.rows, leaf.numel() // self.vocabulary)
        return out


def test_logits_never_exist_whole(teacher: PreTrainedModel, batch: Batch) -> None:
    """Forward and backward; the head's transpose [hidden, vocabulary] is the largest there is."""
    wide = {"vocab_size": 1009, "hidden_size": 16, "head_dim": 4}
    model, teacher = make_model(**wide), make_model(seed=1, **wide)
    large = Batch(*(torch.cat([x] * 8) for x in vars(batch).values()))
    hidden_kl = Term("hidden", HiddenDistill(loss_type="kl"), 1.0)
    with Largest(1009) as seen:
        told = run_teacher(teacher, large, layers=True)
        loss, _ = LossModel(model, chunk_tokens=40)(large, [CE, KL], [hidden_kl], told)
        loss.backward()
    assert _shifted(large)[1].sum() > 400
    assert 0 < seen.rows <= 41  # with the bucket of a top-k there could be one more


def test_the_backward_scales_by_what_comes_from_above(batch: Batch) -> None:
    model = LossModel(make_model())
    once = _gradients(model(batch, [CE])[0], model)
    twice = _gradients(2 * model(batch, [CE])[0], model)
    torch.testing.assert_close(twice, [2 * g for g in once])


def test_scales_may_be_tensors(batch: Batch) -> None:
    model = LossModel(make_model())
    scale = torch.tensor(0.03)
    torch.testing.assert_close(model(batch, [CE._replace(scale=scale)])[0], model(batch, [CE])[0])


def test_a_batch_without_labels_gives_zeros_and_not_nothing(
    teacher: PreTrainedModel, batch: Batch
) -> None:
    """An empty ticket: collectives of FSDP must match those of workers that have tokens."""
    empty = Batch.from_rows(batch.input_ids.numpy(), [[]] * 4, [0] * 4)
    model = LossModel(to_bitnet(make_model()))
    told = run_teacher(teacher, empty, layers=True)
    loss, metrics = model(empty, [CE, KL], [HIDDEN], told)
    assert loss.item() == 0
    loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name
    assert set(metrics) == {"ce/sum", "ce/nll", "kl/sum", "hidden/sum", "hidden/cosine"}


def test_layer_terms_alone_leave_the_head_with_zero_gradient(
    teacher: PreTrainedModel, batch: Batch
) -> None:
    model = LossModel(make_model(tie_word_embeddings=False))
    loss, _ = model(batch, [], [HIDDEN], run_teacher(teacher, batch, layers=True))
    loss.backward()
    assert not model.model.lm_head.weight.grad.any()
    assert model.model.model.layers[0].mlp.up_proj.weight.grad.any()


def test_without_gradients_it_is_the_same_number(teacher: PreTrainedModel, batch: Batch) -> None:
    model = LossModel(make_model(), chunk_tokens=7)
    told = [run_teacher(teacher, batch, layers=True) for _ in range(2)]
    expected, _ = model(batch, [CE, KL], [HIDDEN], told[0])
    with torch.no_grad():
        loss, metrics = model(batch, [CE, KL], [HIDDEN], told[1])
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected.detach())
    assert metrics["ce/sum"] > 0


def test_a_frozen_head_costs_no_gradient(batch: Batch) -> None:
    model = make_model(tie_word_embeddings=False)
    model.lm_head.requires_grad_(False)
    LossModel(model)(batch, [CE])[0].backward()
    assert model.lm_head.weight.grad is None
    assert model.model.norm.weight.grad.any()


def test_autocast_stays_close_and_gives_fp32_gradients(
    teacher: PreTrainedModel, batch: Batch
) -> None:
    model = LossModel(make_model(), chunk_tokens=7)

    def run() -> tuple[Tensor, list[Tensor]]:
        told = run_teacher(teacher, batch, layers=True)
        loss, _ = model(batch, [CE, KL], [HIDDEN], told)
        return loss, _gradients(loss, model)

    loss, gradients = run()
    with torch.autocast("cpu", torch.bfloat16):
        told = run_teacher(teacher, batch, layers=True)
        narrow, _ = model(batch, [CE, KL], [HIDDEN], told)
    torch.testing.assert_close(narrow, loss, rtol=1e-2, atol=0)
    for got, expected in zip(_gradients(narrow, model), gradients, strict=True):
        assert got.dtype == torch.float32
        assert (got - expected).norm() < 0.05 * expected.norm()


def _wrap_layers(model: PreTrainedModel) -> None:
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        layers[index] = checkpoint_wrapper(layer)


def _switch_on(model: PreTrainedModel) -> None:
    for layer in decoder_layers(
        model
    ):  # what transformers' own switch does, under any of its names
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)


@pytest.mark.parametrize("checkpointing", [_wrap_layers, _switch_on])
def test_activation_checkpointing_changes_nothing(
    teacher: PreTrainedModel,
    batch: Batch,
    checkpointing: Callable[[PreTrainedModel], None],
) -> None:
    """In either way of checkpointing; the recomputation must not capture layers again."""
    results = []
    for prepare in (lambda model: None, checkpointing):
        model = to_bitnet(make_model()).train()
        prepare(model)
        told = run_teacher(teacher, batch, layers=True)
        loss, _ = LossModel(model)(batch, [CE, KL], [HIDDEN], told)
        results.append(_gradients(loss, model))
    torch.testing.assert_close(*results, rtol=0, atol=0)


def _states(model: PreTrainedModel, batch: Batch, layer: int) -> list[Tensor]:
    """What goes through the projections: their weights on the input that the layer's norm makes."""
    before = model(**packed_inputs(batch), output_hidden_states=True).hidden_states[layer]
    block = model.model.layers[layer]
    normed = block.input_layernorm(before)
    return [getattr(block.self_attn, f"{name}_proj")(normed) for name in "qkv"]


def plain_attention(model: PreTrainedModel, teacher: PreTrainedModel, batch: Batch) -> Tensor:
    """Relations of whole rows under whole masks, by autograd."""
    document = (batch.position_ids == 0).cumsum(1)
    seen = (document[:, :, None] == document[:, None]).tril()[:, None]
    loss = torch.zeros(())
    for pair in zip(*(_states(m, batch, 1) for m in (model, teacher)), strict=True):
        logp = []
        for states in pair:
            split = states.unflatten(-1, (2, -1)).transpose(1, 2)
            products = split @ split.mT / split.shape[-1] ** 0.5
            logp.append(products.masked_fill(~seen, -1e9).log_softmax(-1))
        divergence = F.kl_div(*logp, log_target=True, reduction="none").sum(-1).mean(1)
        loss = loss + divergence[batch.real].sum() / 3
    return loss


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("model_type", FAMILIES)
def test_attention_relations_of_a_layer(model_type: str, checkpointing: bool, batch: Batch) -> None:
    """Together with the head's terms, for every family, recomputed in the backward or not."""
    model, wide = to_bitnet(make_model(model_type)), {"hidden_size": 96}
    wide = {} if model_type == "qwen3" else wide
    teacher = make_model(model_type, seed=1, **wide).requires_grad_(False)
    expected = ATTENTION.scale * plain_attention(model, teacher, batch)
    expected = expected + plain_loss(model, batch, None)
    wanted = _gradients(expected, model)
    if checkpointing:
        _wrap_layers(model)
    told = run_teacher(teacher, batch, layers=False, attention=-1)
    loss, metrics = LossModel(model)(batch, [CE], [], told, attention=ATTENTION)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(_gradients(loss, model), wanted, rtol=1e-4, atol=1e-5)
    assert set(metrics) == {"ce/sum", "ce/nll", "attention/sum"}


def test_attention_is_zero_for_the_teacher_itself_and_ignores_labels(
    teacher: PreTrainedModel, batch: Batch
) -> None:
    told = run_teacher(teacher, batch, layers=False, attention=0)
    term = Term("attention", AttentionDistill(layer=0), 1.0)
    same = LossModel(make_model(seed=1))
    masked = Batch(**(vars(batch) | {"labels": torch.full_like(batch.labels, IGNORED)}))
    loss, _ = same(masked, [CE], [], told, attention=term)
    loss.backward()
    assert loss.abs() < 1e-6
    assert all(p.grad.abs().max() < 1e-5 for p in same.parameters())
    other, _ = LossModel(make_model())(masked, [CE], [], told, attention=term)
    other.backward()
    assert 0.01 < other < 1


def test_a_layer_that_is_not_there_is_refused(teacher: PreTrainedModel, batch: Batch) -> None:
    with pytest.raises(UserError, match="layer 2: there are 2 decoder layers, 0 to 1"):
        run_teacher(teacher, batch, layers=False, attention=2)


# ---------------------------------------------------------------------------------------- teachers


def test_what_a_teacher_says_is_what_transformers_computes(
    teacher: PreTrainedModel, batch: Batch
) -> None:
    told = run_teacher(teacher, batch, layers=True)
    assert not any(module._forward_hooks for module in teacher.modules())
    expected = teacher(**packed_inputs(batch), output_hidden_states=True)
    torch.testing.assert_close(told.hidden @ told.head.T, expected.logits)
    assert told.layers is not None and len(told.layers) == 2
    torch.testing.assert_close(told.layers[0], expected.hidden_states[1])
    torch.testing.assert_close(teacher.model.norm(told.layers[1]), told.hidden)
    assert run_teacher(teacher, batch, layers=False).layers is None


def test_a_teacher_in_bf16_speaks_to_a_student_in_fp32(batch: Batch) -> None:
    teacher = make_model(seed=1).eval().requires_grad_(False).to(torch.bfloat16)
    model = LossModel(make_model())
    told = run_teacher(teacher, batch, layers=True)
    loss, _ = model(batch, [KL], [HIDDEN], told)
    loss.backward()
    whole = run_teacher(make_model(seed=1), batch, layers=True)
    torch.testing.assert_close(loss, model(batch, [KL], [HIDDEN], whole)[0], rtol=0.05, atol=0)


def test_states_of_both_models_are_never_all_alive(batch: Batch) -> None:
    """Counted when each layer of the student has finished, before its states are compared;
    checkpointing keeps them for the backward, and the teacher's go as they come."""
    depth, alive, mine = 5, list[int](), list[StorageWeakRef]()
    told = run_teacher(make_model(seed=1, num_hidden_layers=depth), batch, layers=True)
    assert told.layers is not None
    theirs = [StorageWeakRef(states.untyped_storage()) for states in told.layers]

    def count(_module: Any, _inputs: Any, states: Tensor) -> None:
        mine.append(StorageWeakRef(states.untyped_storage()))
        alive.append(sum(not each.expired() for each in (*mine, *theirs)))

    model = make_model(num_hidden_layers=depth)
    _wrap_layers(model)
    for layer in decoder_layers(model):
        layer.register_forward_hook(count)
    loss, _ = LossModel(model)(batch, [], [HIDDEN], told)
    assert alive == [depth + 1] * depth
    assert loss > 0 and told.layers == []


def test_a_teacher_that_does_not_fit_is_refused(batch: Batch) -> None:
    model = LossModel(make_model())
    wide = run_teacher(make_model(vocab_size=101), batch, layers=False)
    with pytest.raises(UserError, match=r"vocabulary has 101 entries, the student's 97"):
        model(batch, [KL], [], wide)
    deep = run_teacher(make_model(num_hidden_layers=3), batch, layers=True)
    with pytest.raises(UserError, match=r"2 decoder layers, the teacher 3"):
        model(batch, [], [HIDDEN], deep)


def test_a_teacher_output_is_plain_data() -> None:
    told = TeacherOutput(torch.zeros(1, 2, 3), torch.zeros(5, 3))
    assert told.layers is None

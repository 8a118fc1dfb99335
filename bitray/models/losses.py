"""The forward that ends in losses: head objectives in chunks of tokens, layer objectives per layer.

Logits of shape [tokens, vocabulary] never exist whole. Every loss is differentiated on the spot, a
chunk at a time, inside the forward, where FSDP has gathered the head; the backward only scales.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import PreTrainedModel

from bitray.models.batch import IGNORED, Batch
from bitray.models.families import attention_projections, decoder_layers
from bitray.models.logits import log_softmax, shared_log_softmax
from bitray.models.mask_token import mask_token_id
from bitray.models.packed import last_hidden, packed_inputs
from bitray.models.sparse import TopK
from bitray.nn.linear import compute_dtype
from bitray.nn.moe import TopKRouter
from bitray.settings import UserError


class Term(NamedTuple):
    """One addend of the loss: `scale * objective`, where the objective returns sums over tokens."""

    name: str
    objective: Any
    scale: float | Tensor


@dataclass
class TeacherOutput:
    """What a teacher says about a batch."""

    hidden: Float[Tensor, "batch length hidden"]
    """Input of the head, after the final norm."""
    head: Float[Tensor, "vocab hidden"]
    layers: list[Float[Tensor, "batch length hidden"]] | None = None
    """Output of every decoder layer; emptied by the loss that uses them."""
    projections: list[Float[Tensor, "batch length _"]] | None = None
    """Queries, keys and values of one layer, as the projections put them out."""


NEVER = -1e30
"""A logit of probability 0 at any temperature, and still a number: -inf times 0 is none."""
Metrics = dict[str, Tensor]
Differentiated = tuple[Tensor, list[Tensor | None]]
"""A loss and its gradients."""


class LossModel(nn.Module):
    """A causal language model whose forward returns a loss. The root unit under FSDP2.

    `chunk_tokens` bounds the logits that exist at a time: [chunk_tokens, vocabulary]. None: 256 on
    CPUs, whose caches hold them then (CE + KL at 32,000 entries take 0.6 of the time), else 2048.
    """

    def __init__(self, model: PreTrainedModel, chunk_tokens: int | None = None) -> None:
        super().__init__()
        self.model = model
        self.chunk_tokens = chunk_tokens

    def forward(
        self,
        batch: Batch,
        head_terms: Sequence[Term] = (),
        layer_terms: Sequence[Term] = (),
        teacher: TeacherOutput | TopK | None = None,
        sources: int = 0,
        *,
        attention: Term | None = None,
        router_terms: Sequence[Term] = (),
    ) -> tuple[Float[Tensor, ""], Metrics]:
        """`sum_i scale_i * sum_i` with gradient, and detached sums `{term}/sum`, `{term}/{metric}`.

        With `sources` also `by_source` [2, sources]: cross-entropy and counts by source. Position
        i predicts `labels[:, i+1]`; positions without a label never reach the head. A batch without
        any label runs like any other, so that collectives match: its loss and gradients are zeros.
        """
        metrics: Metrics = defaultdict(lambda: torch.zeros((), device=batch.input_ids.device))
        layers = decoder_layers(self.model) if layer_terms else ()
        compare, compared = self._layer_losses(batch, layer_terms, teacher, metrics)
        watched = attention_projections(self.model, attention.objective.layer) if attention else ()
        routers: Iterable[nn.Module] = self._routers() if router_terms else ()
        with (
            telling(layers, compare),
            capturing(watched) as projected,
            capturing(routers) as routings,
        ):
            hidden = last_hidden(self.model, batch)
        if sources:
            metrics["by_source"] = hidden.new_zeros((2, sources), dtype=torch.float64)
        causal = [term for term in head_terms if not term.objective.on_masked]
        loss = self._head_loss(hidden, batch, causal, teacher, metrics)
        if masked := [term for term in head_terms if term.objective.on_masked]:
            loss = loss + self._head_loss(hidden, batch, masked, teacher, metrics)
        loss = sum(compared, loss)
        if attention is not None:
            assert isinstance(teacher, TeacherOutput), "attention terms need a teacher"
            loss = loss + self._attention_loss(projected, batch, attention, teacher, metrics)
        for term in router_terms:
            result = term.objective.on_routers(routings, batch.real.flatten())
            loss = loss + _add_up(term, result, metrics)
        return loss, dict(metrics)

    def _routers(self) -> list[TopKRouter]:
        found = [module for module in self.model.modules() if isinstance(module, TopKRouter)]
        if not found:
            raise UserError(
                "objectives.moe: the model has no router to balance; begin with one of "
                "create_fake_moe, or leave the objective out"
            )
        return found

    def _head_loss(
        self,
        hidden: Tensor,
        batch: Batch,
        terms: Sequence[Term],
        teacher: TeacherOutput | TopK | None,
        metrics: Metrics,
    ) -> Tensor:
        """Terms that learn the same labels, each at the place that predicts it."""
        head = self.model.get_output_embeddings().weight
        labels = batch.predicted(bool(terms) and terms[0].objective.on_masked).flatten()
        learnt = _places(labels != IGNORED) if terms else labels.new_empty(0)
        told: _Told | TopK | None = None
        if any(term.objective.needs_teacher for term in terms):
            assert teacher is not None, "these terms need a teacher"
            origin = batch.origin(learnt)
            if isinstance(teacher, TopK):
                told = teacher.at(origin)
            else:
                told = _Told.of(teacher, origin, head, mask_token_id(self.model.config))
        source = batch.source_id.repeat_interleave(batch.labels.shape[1])[learnt]
        chunks = _HeadChunks(labels[learnt], source, terms, told, metrics, self._chunk(hidden))
        # Without terms this still ties head and final norm to the loss: gradients 0, not None.
        return differentiated(chunks, _at(hidden, learnt), head)

    def _layer_losses(
        self,
        batch: Batch,
        terms: Sequence[Term],
        teacher: TeacherOutput | TopK | None,
        metrics: Metrics,
    ) -> tuple[Callable[[int, Tensor], None], list[Tensor]]:
        """What to do with the output of each layer as it comes, and where its losses gather. Each
        frees the teacher's own, so that both models' states are never all alive."""
        losses: list[Tensor] = []
        if not terms:
            return lambda *_: None, losses
        assert isinstance(teacher, TeacherOutput), "layer terms need a teacher"
        assert teacher.layers is not None, "layer terms need a teacher's layers"
        num_layers, targets, head = len(decoder_layers(self.model)), teacher.layers, teacher.head
        if num_layers != len(targets):
            raise UserError(
                f"the student has {num_layers} decoder layers, the teacher {len(targets)}; "
                "layer-wise distillation needs the same number"
            )
        real = _places(batch.real.flatten())
        origin = batch.origin(real)

        def compare(index: int, states: Tensor) -> None:
            places = list(zip(*(p.split(self._chunk(states)) for p in (real, origin)), strict=True))
            chunks = _LayerChunks(index, num_layers, targets.pop(0), head, places, terms, metrics)
            losses.append(differentiated(chunks, states))

        return compare, losses

    def _attention_loss(
        self,
        projected: list[Tensor],
        batch: Batch,
        term: Term,
        teacher: TeacherOutput,
        metrics: Metrics,
    ) -> Tensor:
        """The objective on what the projections of one layer put out."""
        assert teacher.projections is not None, "attention terms need a teacher's projections"
        columns = batch.clean
        assert columns is not None, "attention is compared on the rows as they are"
        targets, documents = teacher.projections, batch.documents[:, columns]
        heads = self.model.config.num_key_value_heads

        def work(*states: Tensor, wanted: Sequence[bool]) -> Differentiated:
            total, slopes = term.objective.on_projections(documents, states, targets, heads, wanted)
            loss = _add_up(term, (total, {}), metrics)
            return loss, [None if slope is None else slope * term.scale for slope in slopes]

        return differentiated(work, *(states[:, columns] for states in projected))

    def _chunk(self, hidden: Tensor) -> int:
        return self.chunk_tokens or (256 if hidden.device.type == "cpu" else 2048)


def run_teacher(
    model: PreTrainedModel, batch: Batch, layers: bool, attention: int | None = None
) -> TeacherOutput:
    """What the loss needs of a teacher (`layers`: of its decoder layers too, `attention`: of the
    projections of that layer), without gradients."""
    wanted = [model.base_model, *(decoder_layers(model) if layers else ())]
    watched = () if attention is None else attention_projections(model, attention)
    with torch.no_grad(), capturing(wanted) as outputs, capturing(watched) as projected:
        # The model's own forward, so that it may be an FSDP unit; it makes one row of logits.
        model(**packed_inputs(batch), logits_to_keep=1)
    hidden = outputs.pop().last_hidden_state  # the base model is the last to finish
    head = model.get_output_embeddings().weight.detach()
    head = head.full_tensor() if isinstance(head, DTensor) else head
    return TeacherOutput(hidden, head, outputs if layers else None, projected or None)


@contextmanager
def telling(modules: Iterable[nn.Module], tell: Callable[[int, Any], None]) -> Iterator[None]:
    """`tell(number, output)` whenever one of `modules` finishes.

    The hooks are gone before the backward, where activation checkpointing runs forwards again.
    """
    handles = [
        module.register_forward_hook(lambda _m, _a, output, at=at: tell(at, output))
        for at, module in enumerate(modules)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def capturing(modules: Iterable[nn.Module]) -> Iterator[list[Any]]:
    """The outputs of `modules`, in the order in which they finish."""
    outputs: list[Any] = []
    with telling(modules, lambda _, output: outputs.append(output)):
        yield outputs


# --------------------------------------------------------------- losses differentiated on the spot


class _Differentiated(torch.autograd.Function):
    """`work(*inputs, wanted)` gives the loss and its gradients; the backward scales those."""

    @staticmethod
    def forward(ctx: Any, work: Callable[..., Differentiated], *inputs: Tensor) -> Tensor:
        loss, ctx.gradients = work(*inputs, wanted=ctx.needs_input_grad[1:])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        assert gradients is not None, "this loss can be differentiated once"
        # in place: the gradient of a head can be gigabytes, and nobody else holds it
        return None, *(None if g is None else g.mul_(grad.to(g.dtype)) for g in gradients)


def differentiated(work: Callable[..., Differentiated], *inputs: Tensor) -> Tensor:
    """The loss of `work` as a node of the graph, or as a mere number where gradients are off."""
    if torch.is_grad_enabled():
        return _Differentiated.apply(work, *inputs)
    return work(*inputs, wanted=(False,) * len(inputs))[0]


def _places(wanted: Bool[Tensor, " n"]) -> Int[Tensor, " m"]:
    """Indices of what is wanted; on a GPU this waits for it, so it is done once for all uses."""
    return wanted.nonzero().squeeze(1)


def _at(
    states: Float[Tensor, "batch length hidden"], places: Int[Tensor, " m"]
) -> Float[Tensor, "m hidden"]:
    return states.flatten(0, 1).index_select(0, places)


def _add_up(
    term: Term, result: tuple[Tensor, dict[str, Tensor]], metrics: Metrics
) -> Float[Tensor, ""]:
    """Record the sums of a term; its part of the loss."""
    total, reported = result
    for key, value in {"sum": total, **reported}.items():
        metrics[f"{term.name}/{key}"] += value.detach()
    return total * term.scale


@dataclass
class _Told:
    """A teacher's logits at the learnt positions, made when they are asked for."""

    hidden: Float[Tensor, "n hidden"]
    head: Float[Tensor, "vocab hidden"]
    unknown: int
    """Rows of the student's vocabulary that the teacher lacks: the mask token and its padding."""

    @classmethod
    def of(
        cls,
        teacher: TeacherOutput,
        learnt: Int[Tensor, " n"],
        student_head: Tensor,
        mask_token: int | None,
    ) -> "_Told":
        unknown = student_head.shape[0] - teacher.head.shape[0]
        grown = mask_token is not None and teacher.head.shape[0] <= mask_token
        if unknown and not grown:
            raise UserError(
                f"the teacher's vocabulary has {teacher.head.shape[0]} entries, the student's "
                f"{student_head.shape[0]}; they must be the same"
            )
        dtype = compute_dtype(teacher.head)
        return cls(_at(teacher.hidden, learnt).to(dtype), teacher.head.to(dtype), unknown)

    def part(self, rows: slice) -> Float[Tensor, "n vocab"]:
        with torch.no_grad():
            logits = F.linear(self.hidden[rows], self.head).float()
            return F.pad(logits, (0, self.unknown), value=NEVER) if self.unknown else logits


@dataclass
class _HeadChunks:
    """All head objectives on the logits of one chunk of tokens after the other."""

    labels: Int[Tensor, " n"]
    source: Int[Tensor, " n"]
    terms: Sequence[Term]
    told: _Told | TopK | None
    metrics: Metrics
    chunk_tokens: int

    def __call__(self, hidden: Tensor, head: Tensor, wanted: Sequence[bool]) -> Differentiated:
        dtype = compute_dtype(hidden)
        weight = head.to(dtype)
        grad_hidden = torch.zeros_like(hidden) if wanted[0] else None
        grad_head = torch.zeros_like(head, dtype=torch.float32) if wanted[1] else None
        loss = hidden.new_zeros((), dtype=torch.float32)
        for rows in _slices(len(hidden), self.chunk_tokens) if self.terms else ():
            states = hidden[rows].to(dtype)
            value, grad = self._chunk(F.linear(states, weight), rows, any(wanted))
            loss += value
            if grad_hidden is not None:
                grad_hidden[rows] = grad @ weight
            if grad_head is not None:
                _accumulate(grad_head, grad.t(), states)
        return loss, [grad_hidden, grad_head]

    def _chunk(self, logits: Tensor, rows: slice, wanted: bool) -> tuple[Tensor, Tensor]:
        dtype, logits = logits.dtype, logits.detach().float()
        with torch.set_grad_enabled(wanted), shared_log_softmax():
            logits.requires_grad_(wanted)
            told = self.told.part(rows) if self.told is not None else None
            loss = logits.new_zeros(())
            for term in self.terms:
                theirs = told if term.objective.needs_teacher else None
                result = term.objective.on_logits(logits, self.labels[rows], theirs)
                loss = loss + _add_up(term, result, self.metrics)
            if "by_source" in self.metrics and not self.terms[0].objective.on_masked:
                self._by_source(logits, rows)
            if not wanted:
                return loss, logits
            return loss.detach(), torch.autograd.grad(loss, logits)[0].to(dtype)

    @torch.no_grad()
    def _by_source(self, logits: Tensor, rows: slice) -> None:
        """Who lost how much; the log-probabilities are those of the cross-entropy term."""
        logp = log_softmax(logits, 1.0).detach()
        nll = F.nll_loss(logp, self.labels[rows], reduction="none").double()
        found = self.metrics["by_source"]
        found[0].index_add_(0, self.source[rows], nll)
        found[1].index_add_(0, self.source[rows], torch.ones_like(nll))


def _slices(count: int, size: int) -> list[slice]:
    """Slices of at most `size` that cover `count`; one empty slice for nothing."""
    return [slice(start, min(start + size, count)) for start in range(0, max(count, 1), size)]


def _accumulate(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, without a temporary where the dtypes allow it."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


@dataclass
class _LayerChunks:
    """All layer objectives on one layer, one chunk of tokens after the other."""

    index: int
    num_layers: int
    target: Float[Tensor, "batch length hidden"]
    head: Float[Tensor, "vocab hidden"]
    places: Sequence[tuple[Tensor, Tensor]]
    """Of each chunk: where its tokens are in the student's states and in the teacher's."""
    terms: Sequence[Term]
    metrics: Metrics

    def __call__(self, states: Tensor, wanted: Sequence[bool]) -> Differentiated:
        grad = states.new_zeros(states.shape) if wanted[0] else None
        loss = states.new_zeros((), dtype=torch.float32)
        for mine, theirs in self.places:
            part = _at(states, mine).detach().requires_grad_(wanted[0])
            with torch.set_grad_enabled(wanted[0]):
                value = self._chunk(part, _at(self.target, theirs))
            loss += value.detach()
            if grad is not None:
                grad.view(-1, grad.shape[-1])[mine] = torch.autograd.grad(value, part)[0]
        return loss, [grad]

    def _chunk(self, states: Tensor, target: Tensor) -> Tensor:
        loss = states.new_zeros((), dtype=torch.float32)
        for term in self.terms:
            result = term.objective.on_layer(self.index, self.num_layers, states, target, self.head)
            loss = loss + _add_up(term, result, self.metrics)
        return loss

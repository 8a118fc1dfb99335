"""Distillation of attention relations (BitDistill, arXiv 2510.13998, eq. 10-11; after MiniLMv2,
arXiv 2012.15828)."""

import math
from collections.abc import Iterator, Sequence
from typing import Annotated, Literal

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor
from torch.nn.functional import log_softmax, softmax

from bitray.objectives.base import AttentionObjective, Gradients, Weight
from bitray.objectives.logits_distill import kl_divergence
from bitray.settings import UserError

States = Float[Tensor, "batch length _"]
Documents = Int[Tensor, "batch length"]
Split = Float[Tensor, "batch heads length _"]

HIDDEN = -1e30
"""Logit of what a token does not see; finite, so that differences are never NaN."""
TILE = 2**22
"""Numbers of a tile of relations, [batch, heads, rows, keys], of student and of teacher."""


class AttentionDistill(AttentionObjective):
    """KL(R_t || R_s) of `R = softmax(A A^T / sqrt(d))`, causal and within the document, averaged
    over relation heads and over A = Q, K, V: what the projections of one layer put out.

    Student and teacher are re-split into the same number of relation heads, whatever their own
    heads. Relations are made in tiles of rows, never [heads, length, length] whole.
    """

    weight: Weight = 1.0
    gamma: Literal["auto"] | Annotated[float, Field(gt=0, allow_inf_nan=False)] = "auto"
    """Factor of the loss beside its weight. `auto`: measured at the first step at full strength, so
    that this gradient is `grad_ratio` of that of continue_pretrain; kept in checkpoints."""
    grad_ratio: float = Field(default=0.1, gt=0, allow_inf_nan=False)
    relation_heads: int | None = Field(default=None, ge=1)
    """None: the most that divide the student's key-value heads and every width."""
    relations: Literal["qkv", "probabilities"] = "qkv"
    """`probabilities`: A = softmax(Q K^T / sqrt(d)), before rotary embeddings, for comparison only.
    Their products are nearly 0, so all relations are nearly uniform: no signal."""

    @property
    def factor(self) -> float | None:
        """`gamma`, or None where it is to be measured."""
        return None if self.gamma == "auto" else self.gamma

    def on_projections(
        self,
        documents: Documents,
        student: Sequence[States],
        teacher: Sequence[States],
        key_heads: int,
        wanted: Sequence[bool],
    ) -> tuple[Float[Tensor, ""], Gradients]:
        """Sum over real tokens, and its gradients, exactly 0 for identical states; in fp32."""
        with torch.autocast(documents.device.type, enabled=False), torch.no_grad():
            widths = ([x.shape[-1] for x in side] for side in (student, teacher))
            heads = self.heads_for(key_heads, *widths)
            if self.relations == "probabilities":
                return _of_probabilities(
                    documents, student, teacher, heads, key_heads, wanted=any(wanted)
                )
            share = 1 / (heads * len(student))
            loss, gradients = torch.zeros((), device=documents.device), []  # type: Tensor, Gradients
            for ours, theirs, each in zip(student, teacher, wanted, strict=True):
                states, target = _split(ours.float(), heads), _split(theirs.float(), heads)
                value, grad = relation_loss(states, target, documents, each)
                loss += value * share
                if grad is not None:
                    grad = (grad * share).transpose(1, 2).flatten(2).to(ours.dtype)
                gradients.append(grad)
        return loss, gradients

    def heads_for(self, key_heads: int, student: Sequence[int], teacher: Sequence[int]) -> int:
        """Relation heads for projections of these widths, the student's own for `probabilities`;
        `UserError` for what does not fit."""
        if self.relations == "probabilities":
            if list(student) != list(teacher):
                raise UserError(
                    "attention_distill.relations: probabilities needs a teacher whose attention is "
                    "as wide as the student's; take qkv"
                )
            queries, keys, _ = student
            return queries * key_heads // keys
        widths = (*student, *teacher)
        if self.relation_heads is None:
            return math.gcd(key_heads, *widths)
        if misfit := [width for width in widths if width % self.relation_heads]:
            raise UserError(
                f"attention_distill.relation_heads: {self.relation_heads} does not divide the "
                f"{misfit[0]} numbers of a projection; take a divisor of {math.gcd(*widths)}"
            )
        return self.relation_heads


def _of_probabilities(
    documents: Documents,
    student: Sequence[States],
    teacher: Sequence[States],
    heads: int,
    key_heads: int,
    *,
    wanted: bool,
) -> tuple[Float[Tensor, ""], Gradients]:
    """One head at a time: a map is as wide as it is long."""
    q, k = (x.detach().float().requires_grad_(wanted) for x in student[:2])
    q_t, k_t = (x.detach().float() for x in teacher[:2])
    loss = torch.zeros((), device=q.device)
    for head in range(heads):
        with torch.set_grad_enabled(wanted):
            maps = _attention(q, k, head, key_heads, documents)
        target = _attention(q_t, k_t, head, key_heads, documents)
        value, grad = relation_loss(maps.detach(), target, documents, wanted)
        loss += value / heads
        if grad is not None:
            maps.backward(grad / heads)
    found = [None if x.grad is None else x.grad.to(student[0].dtype) for x in (q, k)]
    return loss, [*found, None]


def _attention(
    queries: States, keys: States, head: int, key_heads: int, documents: Documents
) -> Split:
    """The map of one head, in which it alone is whole."""
    heads = queries.shape[-1] * key_heads // keys.shape[-1]
    query = _split(queries, heads)[:, head, None]
    key = _split(keys, key_heads)[:, head * key_heads // heads, None]
    seen = _visible(documents, slice(0, query.shape[2]))
    return softmax(_logits(query, key, seen), -1) * seen


def relation_loss(
    student: Split, teacher: Split, documents: Documents, wanted: bool
) -> tuple[Float[Tensor, ""], Split | None]:
    """Sum over heads and real tokens of the relations' KL, and its gradient in the student."""
    grad = torch.zeros_like(student) if wanted else None
    loss = torch.zeros((), device=student.device)
    for rows in _tiles(student):
        keys = slice(0, rows.stop)  # what comes after the last row is seen by none of them
        seen = _visible(documents, rows)
        target = log_softmax(_logits(teacher[:, :, rows], teacher[:, :, keys], seen), -1)
        logits = _logits(student[:, :, rows], student[:, :, keys], seen).requires_grad_(wanted)
        with torch.set_grad_enabled(wanted):
            value = kl_divergence(target.flatten(0, 2), log_softmax(logits, -1).flatten(0, 2)).sum()
        loss += value.detach()
        if grad is not None:
            (slope,) = torch.autograd.grad(value, logits)
            slope = slope.masked_fill_(~seen, 0.0) * student.shape[-1] ** -0.5
            grad[:, :, rows] += slope @ student[:, :, keys]
            grad[:, :, keys] += slope.mT @ student[:, :, rows]
    return loss, grad


def _logits(
    rows: Float[Tensor, "batch heads rows dim"],
    keys: Float[Tensor, "batch heads keys dim"],
    seen: Bool[Tensor, "batch 1 rows keys"],
) -> Float[Tensor, "batch heads rows keys"]:
    return (rows @ keys.mT * rows.shape[-1] ** -0.5).masked_fill(~seen, HIDDEN)


def _visible(documents: Documents, rows: slice) -> Bool[Tensor, "batch 1 rows keys"]:
    """Which keys up to the last row are of a row's own document and not after it. Padding sees
    nothing, which makes its relations uniform, so it adds nothing to the loss."""
    places = torch.arange(rows.stop, device=documents.device)
    own = documents[:, rows, None]
    seen = (own == documents[:, None, : rows.stop]) & (own > 0) & (places[rows, None] >= places)
    return seen[:, None]


def _tiles(states: Split) -> Iterator[slice]:
    batch, heads, length, _ = states.shape
    rows = max(1, TILE // (batch * heads * max(length, 1)))
    for start in range(0, length, rows):
        yield slice(start, min(start + rows, length))


def _split(states: States, heads: int) -> Split:
    return states.unflatten(-1, (heads, -1)).transpose(1, 2)

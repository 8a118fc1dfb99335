"""Where each weight goes in a file: zero-padding to block sizes and the rotary row order, exactly.

Padding adds zero rows and columns, so no product changes. An RMSNorm over n of P features keeps
its value when its weight is multiplied by sqrt(n/P) and its eps by n/P. A padded head that shares a
real key head puts out something, which zero columns of the output projection remove; where a SubLN
stands in between, it must have a padded key head, whose values are zero.
"""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

import numpy as np
from jaxtyping import Float32, Int, Num

Axis = Literal["hidden", "queries", "keys", "values", "attention", "ffn"]

PROJECTION_AXES: dict[str, tuple[Axis, Axis]] = {
    "q": ("queries", "hidden"),
    "k": ("keys", "hidden"),
    "v": ("values", "hidden"),
    "o": ("hidden", "attention"),
    "gate": ("ffn", "hidden"),
    "up": ("ffn", "hidden"),
    "down": ("hidden", "ffn"),
}
"""Rows and columns of each projection's weight [out, in]."""


@dataclass(frozen=True)
class Dims:
    """The widths of a decoder."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    @property
    def attention(self) -> int:
        """Width of the heads' outputs together, the input of the output projection."""
        return self.heads * self.head_dim

    def __str__(self) -> str:
        return (
            f"hidden {self.hidden}, heads {self.heads}, kv heads {self.kv_heads}, "
            f"head_dim {self.head_dim}, intermediate {self.ffn}"
        )


@dataclass(frozen=True)
class Rules:
    """What an architecture asks of the widths.

    `square`: heads * head_dim must equal the hidden size. `one_ratio`: every norm of the model has
    the same eps and not all of them lie on the hidden axis, so all padded axes must grow by one
    ratio. `fixed_hidden`: norms of fixed width share the eps, so the hidden axis cannot grow.
    """

    block: int
    square: bool
    one_ratio: bool
    fixed_hidden: bool


def _round_up(width: int, block: int) -> int:
    return -(-width // block) * block


def _key_heads(dims: Dims, heads: int, rules: Rules) -> int | None:
    """Key heads for more heads: whole groups are added, else (see above) heads to each group."""
    group = dims.heads // dims.kv_heads
    if heads % group == 0:
        return heads // group
    if rules.one_ratio:
        return None
    for kv_heads in range(dims.kv_heads, heads // group + 1):
        if heads % kv_heads == 0:
            return kv_heads
    return None


def _widths(dims: Dims, heads: int, rules: Rules) -> tuple[int, int]:
    """Hidden and intermediate sizes that go with a number of heads."""
    hidden = heads * dims.head_dim if rules.square else _round_up(dims.hidden, rules.block)
    if rules.one_ratio:
        return hidden, dims.ffn * heads // dims.heads if dims.ffn * heads % dims.heads == 0 else 0
    return hidden, _round_up(dims.ffn, rules.block)


def _fits(dims: Dims, padded: Dims, rules: Rules) -> bool:
    blocks = all(w % rules.block == 0 for w in (padded.hidden, padded.attention, padded.ffn))
    grown = padded.hidden >= dims.hidden and padded.ffn >= dims.ffn
    ratio = not rules.one_ratio or padded.hidden * dims.attention == dims.hidden * padded.attention
    hidden = not rules.fixed_hidden or padded.hidden == dims.hidden
    return blocks and grown and ratio and hidden


def pad(dims: Dims, rules: Rules) -> Dims | None:
    """The smallest widths that obey the rules, `dims` themselves where they do; None if none do.

    At most four times the heads: beyond that a ternary file is larger than a float one.
    """
    for heads in range(dims.heads, 4 * dims.heads + 1):
        kv_heads = _key_heads(dims, heads, rules)
        if kv_heads is None:
            continue
        hidden, ffn = _widths(dims, heads, rules)
        padded = replace(dims, hidden=hidden, heads=heads, kv_heads=kv_heads, ffn=ffn)
        if _fits(dims, padded, rules):
            return padded
    return None


@dataclass(frozen=True)
class Layout:
    """From the model's weights to the file's: sizes before and after, and the order of rows.

    `rotary_pairs`: rows of q and k go into the order of ggml's NORM rotary (neighbouring pairs)
    from Hugging Face's (halves).
    """

    dims: Dims
    padded: Dims
    rotary_pairs: bool

    def size(self, axis: Axis) -> int:
        """Length of an axis in the file."""
        return _size(self.padded, axis)

    def index(self, axis: Axis) -> Int[np.ndarray, " n"]:
        """Position in the file of each of the model's entries along an axis."""
        return self._indices[axis]

    @cached_property
    def _indices(self) -> dict[Axis, np.ndarray]:
        heads = self._head_places()
        keys = np.arange(self.dims.kv_heads)
        within = np.arange(self.dims.head_dim)
        pairs = self._rotary_places() if self.rotary_pairs else within
        return {
            "hidden": np.arange(self.dims.hidden),
            "ffn": np.arange(self.dims.ffn),
            "attention": self._rows(heads, within),
            "queries": self._rows(heads, pairs),
            "values": self._rows(keys, within),
            "keys": self._rows(keys, pairs),
        }

    def _rows(self, heads: np.ndarray, within: np.ndarray) -> np.ndarray:
        return (heads[:, None] * self.dims.head_dim + within[None]).reshape(-1)

    def _head_places(self) -> np.ndarray:
        """Heads keep their key head: head i of a group of g stays within the group of g'."""
        group = self.dims.heads // self.dims.kv_heads
        padded_group = self.padded.heads // self.padded.kv_heads
        heads = np.arange(self.dims.heads)
        return heads // group * padded_group + heads % group

    def _rotary_places(self) -> np.ndarray:
        half = self.dims.head_dim // 2
        return np.arange(self.dims.head_dim).reshape(half, 2).T.reshape(-1)

    def place(
        self, values: Num[np.ndarray, "rows columns"], rows: Axis | None, columns: Axis
    ) -> Num[np.ndarray, "rows2 columns2"]:
        """A matrix as the file has it; `rows=None` leaves the rows alone (embeddings)."""
        if self.identity:
            return values
        at = np.arange(len(values)) if rows is None else self.index(rows)
        height = len(values) if rows is None else self.size(rows)
        placed = np.zeros((height, self.size(columns)), values.dtype)
        placed[np.ix_(at, self.index(columns))] = values
        return placed

    def place_vector(self, values: Float32[np.ndarray, " n"], axis: Axis) -> np.ndarray:
        """A bias as the file has it."""
        placed = np.zeros(self.size(axis), values.dtype)
        placed[self.index(axis)] = values
        return placed

    def place_norm(self, weight: Float32[np.ndarray, " n"], axis: Axis) -> np.ndarray:
        """The weight of an RMSNorm over `axis`, such that `eps()` and zeros make it exact."""
        factor = math.sqrt(len(weight) / self.size(axis))
        return self.place_vector((weight.astype(np.float64) * factor).astype(np.float32), axis)

    def eps(self, eps: float) -> float:
        """The eps that goes with norms over padded features."""
        return eps * self.dims.hidden / self.padded.hidden

    def take(
        self, placed: Num[np.ndarray, "rows2 columns2"], rows: Axis, columns: Axis
    ) -> Num[np.ndarray, "rows columns"]:
        """The inverse of `place`, forgetting the padding."""
        if self.identity:
            return placed
        return placed[np.ix_(self.index(rows), self.index(columns))]

    @property
    def changed(self) -> bool:
        """Whether widths grow."""
        return self.dims != self.padded

    @property
    def identity(self) -> bool:
        """Whether matrices go into the file as they are."""
        return not self.changed and not self.rotary_pairs


def _size(dims: Dims, axis: Axis) -> int:
    match axis:
        case "hidden":
            return dims.hidden
        case "ffn":
            return dims.ffn
        case "queries" | "attention":
            return dims.attention
        case "keys" | "values":
            return dims.kv_heads * dims.head_dim

"""Order without state: a counter-based hash, and seeded permutations evaluated pointwise.

Written out in unsigned integers instead of numpy's generators, whose streams may change between
versions: every machine and every release has to find the same rows in the same order.
"""

import hashlib

import numpy as np
from jaxtyping import Int, Int64, UInt64

WINDOW = 65_536
"""Rows that are permuted among themselves, unless settings say otherwise."""
_ROUNDS = 4
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def key_of(*words: int | str) -> int:
    """63 bits that stand for these words."""
    text = "\0".join(str(word) for word in words)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") >> 1


def mix(*words: np.ndarray | int) -> UInt64[np.ndarray, " n"]:
    """Hash of integer words at each position, which broadcast: SplitMix64, word after word.

    Steele, Lea and Flood, "Fast splittable pseudorandom number generators", 2014.
    """
    value = np.zeros(1, np.uint64)
    for word in words:
        value = (value ^ np.asarray(word).astype(np.uint64)) + _GOLDEN
        value = (value ^ (value >> np.uint64(30))) * _FIRST
        value = (value ^ (value >> np.uint64(27))) * _SECOND
        value = value ^ (value >> np.uint64(31))
    return value


def permute(
    index: Int[np.ndarray, " n"], size: Int[np.ndarray, " n"], key: UInt64[np.ndarray, " n"]
) -> Int64[np.ndarray, " n"]:
    """Where a permutation of `range(size)`, chosen by `key`, sends each index.

    A Feistel network over the next power of two; what falls outside walks on until it is inside
    (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    bits = np.maximum(2, np.ceil(np.log2(np.maximum(size, 2)))).astype(np.uint64)
    value = index.astype(np.uint64)
    outside = np.ones(len(value), bool)
    while outside.any():
        value[outside] = _feistel(value[outside], bits[outside], key[outside])
        outside = value >= size.astype(np.uint64)
    return value.astype(np.int64)


def _feistel(value: np.ndarray, bits: np.ndarray, key: np.ndarray) -> np.ndarray:
    """One pass over values of so many bits; the halves' widths swap with every round."""
    one = np.uint64(1)
    left_bits = bits >> one
    right_bits = bits - left_bits
    for turn in range(_ROUNDS):
        left, right = value >> right_bits, value & ((one << right_bits) - one)
        noise = mix(key + np.uint64(turn), right) & ((one << left_bits) - one)
        value = (right << left_bits) | (left ^ noise)
        left_bits, right_bits = right_bits, left_bits
    return value


def place(
    cursor: Int[np.ndarray, " n"],
    rows: Int[np.ndarray, " n"],
    key: Int[np.ndarray, " n"],
    size: Int[np.ndarray, " n"] | int = WINDOW,
) -> tuple[Int64[np.ndarray, " n"], Int64[np.ndarray, " n"]]:
    """Epoch and row number of the cursor-th draw, without replacement, from sources of `rows`.

    Rows are permuted inside windows of `size`. The first epoch takes the windows in the order in
    which they were prepared; later ones shuffle them, and shift where the windows begin.
    """
    epoch, index = np.divmod(cursor.astype(np.int64), rows)
    seed = mix(key, epoch)
    window, within = np.divmod(index, size)
    whole = rows // size
    again = (epoch > 0) & (window < whole)
    window[again] = permute(window[again], whole[again], seed[again])
    first = window * size
    row = first + permute(within, np.minimum(size, rows - first), mix(seed, window))
    if epoch.any():
        shift = (mix(seed, 0, 0) % rows.astype(np.uint64)).astype(np.int64)
        row = np.where(epoch > 0, (row + shift) % rows, row)
    return epoch, row

"""A slow interpreter of GGUF files in NumPy, to prove exports by, above all I2_S.

Of bitray it uses the reader of headers alone. Bytes, rotary, norms and the I2_S kernel are written
here again, from the formats' descriptions and in double precision, so that an error of the exporter
is not repeated.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bitray.export.reader import GGUF, read_gguf

# --------------------------------------------------------------------------------------- the bytes


def i2_s_codes(data: np.ndarray, count: int) -> tuple[np.ndarray, float]:
    """Weight k of block b: bits `6 - 2 (k // 32)` of byte `32 b + k % 32`; then the scale."""
    k = np.arange(count)
    byte = data[32 * (k // 128) + k % 32].astype(np.int64)
    codes = (byte >> (6 - 2 * (k % 128 // 32))) & 3
    scale = np.frombuffer(data[count // 4 : count // 4 + 4].tobytes(), "<f4")[0]
    return codes - 1, float(scale)


def tq2_0_values(data: np.ndarray, count: int) -> np.ndarray:
    """Weight k of a block: bits `2 (k % 128 // 32)` of byte `32 (k // 128) + k % 32`, f16 scale."""
    block, k = np.divmod(np.arange(count), 256)
    byte = data[66 * block + 32 * (k // 128) + k % 32].astype(np.int64)
    return (((byte >> (2 * (k % 128 // 32))) & 3) - 1) * _f16(data, 66 * block + 64)


def tq1_0_values(data: np.ndarray, count: int) -> np.ndarray:
    """Digit `n` of a byte is the carry of `(byte * 3^n mod 256) * 3`; 32x5, 16x5 and 4x4 digits."""
    block, k = np.divmod(np.arange(count), 256)
    first, second = k < 160, k < 240
    at = np.where(first, k % 32, np.where(second, 32 + (k - 160) % 16, 48 + (k - 240) % 4))
    digit = np.where(first, k // 32, np.where(second, (k - 160) // 16, (k - 240) // 4))
    byte = data[54 * block + at].astype(np.int64)
    return ((((byte * 3**digit) % 256) * 3 >> 8) - 1) * _f16(data, 54 * block + 52)


def _f16(data: np.ndarray, at: np.ndarray) -> np.ndarray:
    bits = data[at].astype(np.uint16) | data[at + 1].astype(np.uint16) << 8
    return bits.view(np.float16).astype(np.float64)


def i2_s_product(x: np.ndarray, codes: np.ndarray, scale: float) -> np.ndarray:
    """bitnet.cpp's kernel: int8 activations per token times codes 0, 1, 2, less the sum of x."""
    factor = np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), 1e-5)
    x_codes = np.clip(np.rint(x * factor), -128, 127).astype(np.int64)
    product = x_codes @ (codes + 1).T - x_codes.sum(-1, keepdims=True)
    return product / factor.astype(np.float64) * scale


# ------------------------------------------------------------------------------------ the network


class Engine:
    """Logits of a file of architecture llama, bitnet, qwen2, qwen3 or qwen3moe."""

    def __init__(self, path: str | Path, int8: bool = False) -> None:
        """`int8`: activations of I2_S layers as bitnet.cpp has them, else in floating point."""
        self.file: GGUF = read_gguf(path)
        self.int8 = int8
        self.arch: str = self.file.fields["general.architecture"]
        self.eps = self.key("attention.layer_norm_rms_epsilon")
        self.heads, self.kv_heads = (
            self.key("attention.head_count"),
            self.key("attention.head_count_kv"),
        )
        self.head_dim = self.key("rope.dimension_count")

    def key(self, name: str) -> Any:
        return self.file.fields[f"{self.arch}.{name}"]

    def matrix(self, name: str) -> np.ndarray:
        record = self.file.tensors[name]
        data, count = self.file.raw(name), int(np.prod(record.shape))
        decode = {"tq1_0": tq1_0_values, "tq2_0": tq2_0_values}.get(record.kind.name)
        if record.kind.name == "i2_s":
            codes, scale = i2_s_codes(data, count)
            values = codes * scale
        else:
            values = decode(data, count) if decode else self.file.floats(name).astype(np.float64)
        scale_name = name.removesuffix("weight") + "scale"
        factor = self.file.floats(scale_name) if scale_name in self.file.tensors else np.ones(1)
        if len(record.shape) == 3:  # of experts, each of which has its own
            factor = factor[:, None, None]
        return values.reshape(record.shape) * factor

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        record = self.file.tensors[f"{name}.weight"]
        if record.kind.name == "i2_s" and self.int8:
            count = int(np.prod(record.shape))
            codes, scale = i2_s_codes(self.file.raw(f"{name}.weight"), count)
            y = i2_s_product(x.astype(np.float32), codes.reshape(record.shape), scale)
        else:
            y = x @ self.matrix(f"{name}.weight").T
        if f"{name}.bias" in self.file.tensors:
            y = y + self.file.floats(f"{name}.bias")
        return y

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        weight = self.file.floats(f"{name}.weight").astype(np.float64)
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + self.eps) * weight

    def optional_norm(self, x: np.ndarray, name: str) -> np.ndarray:
        return self.norm(x, name) if f"{name}.weight" in self.file.tensors else x

    def rotate(self, x: np.ndarray) -> np.ndarray:
        """Rotary embedding of [tokens, heads, head_dim]: neighbours for llama, halves otherwise."""
        half = self.head_dim // 2
        angle = self.key("rope.freq_base") ** (-np.arange(half) / half)
        if "rope_freqs.weight" in self.file.tensors:
            angle = angle / self.file.floats("rope_freqs.weight")
        angle = (np.arange(len(x))[:, None] * angle)[:, None]
        pairs = (slice(0, None, 2), slice(1, None, 2))
        a, b = pairs if self.arch == "llama" else (slice(0, half), slice(half, None))
        out = np.empty_like(x)
        out[..., a] = x[..., a] * np.cos(angle) - x[..., b] * np.sin(angle)
        out[..., b] = x[..., a] * np.sin(angle) + x[..., b] * np.cos(angle)
        return out

    def attention(self, x: np.ndarray, block: str) -> np.ndarray:
        def split(name: str, heads: int) -> np.ndarray:
            return self.linear(x, f"{block}.{name}").reshape(len(x), heads, self.head_dim)

        q = self.rotate(self.optional_norm(split("attn_q", self.heads), f"{block}.attn_q_norm"))
        k = self.rotate(self.optional_norm(split("attn_k", self.kv_heads), f"{block}.attn_k_norm"))
        v = split("attn_v", self.kv_heads)
        k, v = (np.repeat(t, self.heads // self.kv_heads, axis=1) for t in (k, v))
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(self.head_dim)
        scores = np.where(np.tri(len(x), dtype=bool), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out = np.einsum("hqk,khd->qhd", weights, v).reshape(len(x), -1)
        return self.linear(
            self.optional_norm(out, f"{block}.attn_sub_norm"), f"{block}.attn_output"
        )

    def experts(self, x: np.ndarray, block: str) -> np.ndarray:
        """Softmax, the k largest, made to sum to 1; each token through its own."""
        router = self.linear(x, f"{block}.ffn_gate_inp")
        likely = np.exp(router - router.max(-1, keepdims=True))
        gate, up, down = (
            self.matrix(f"{block}.ffn_{n}_exps.weight") for n in ("gate", "up", "down")
        )
        out = np.zeros_like(x)
        for t, token in enumerate(x):
            chosen = np.argsort(-likely[t], kind="stable")[: self.key("expert_used_count")]
            for e in chosen:
                a = gate[e] @ token
                share = likely[t, e] / likely[t, chosen].sum()
                out[t] += share * (down[e] @ (a / (1 + np.exp(-a)) * (up[e] @ token)))
        return out

    def mlp(self, x: np.ndarray, block: str) -> np.ndarray:
        if f"{block}.ffn_gate_inp.weight" in self.file.tensors:
            return self.experts(x, block)
        gate, up = self.linear(x, f"{block}.ffn_gate"), self.linear(x, f"{block}.ffn_up")
        hidden = gate / (1 + np.exp(-gate)) * up
        return self.linear(self.optional_norm(hidden, f"{block}.ffn_sub_norm"), f"{block}.ffn_down")

    def logits(self, ids: list[int]) -> np.ndarray:
        """Logits [tokens, vocabulary] of one sequence."""
        x = self.matrix("token_embd.weight")[ids]
        for index in range(int(self.key("block_count"))):
            block = f"blk.{index}"
            x = x + self.attention(self.norm(x, f"{block}.attn_norm"), block)
            x = x + self.mlp(self.norm(x, f"{block}.ffn_norm"), block)
        head = "output" if "output.weight" in self.file.tensors else "token_embd"
        return self.linear(self.norm(x, "output_norm"), head)

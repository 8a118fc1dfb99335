"""Proves GGUF exports with a real llama.cpp (`make verify-gguf`, or install llama-cpp-python).

  python scripts/verify_gguf.py                 # small models of every architecture, in every type
  python scripts/verify_gguf.py checkpoint=DIR  # a checkpoint or model folder, in every type
  python scripts/verify_gguf.py checkpoint=DIR FILE.gguf ...   # files made from that checkpoint
  python scripts/verify_gguf.py FILE.gguf       # a file alone: well formed, and llama.cpp runs it

Of each file: every code and scale equals training's; logits against the same model in transformers;
greedy tokens; and the ids that llama.cpp's tokenizer gives. I2_S, which only bitnet.cpp reads, runs
through a NumPy engine with bitnet.cpp's kernel. The exit status is 1 if anything fails.
"""

import argparse
import copy
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf_engine import Engine, i2_s_codes, i2_s_product
from gguf_models import MADE, WITH_EXPERTS, make_model
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitray.export import GGUF_TYPES, can_export, write_gguf
from bitray.export.entries import entries
from bitray.export.layout import PROJECTION_AXES
from bitray.export.packing import FILE_TYPES, unpack
from bitray.export.plan import plan
from bitray.export.reader import GGUF, read_gguf
from bitray.export.reference import dequantized
from bitray.export.verify import check_gguf
from bitray.models import load_model, load_tokenizer
from bitray.models.moe import experts_of
from bitray.nn import BitLinear
from bitray.settings import UserError

EXACT = 1e-5
"""Bound of the relative RMS error of logits where the arithmetic is the same but for its order."""
ROUNDED = {"f16": 5e-3, "bf16": 3e-2, "tq1_0": 5e-2, "tq2_0": 5e-2}
"""Bounds where weights are rounded (f16, bf16) or activations are (TQ: int8 in blocks of 256).

Trained models are far below (0.004 after 150 steps); only deep networks of random weights amplify
the rounding of int8 activations beyond 0.05, and then their own training forward is as far off.
"""
REROUTED = 0.2
"""Bound where rounding may also send a token to another expert, of which it needs a near tie."""
FILE_TYPE_KEY = "general.file_type"
SAMPLES = (
    "Hello world, it's 1 234.56 o'clock!  Two  spaces\n\n\tand a tab\r\n",
    "def f(x):\n    return x ** 2  # don't\n",
    "Größe, naïve, 漢字かな, 🙂🚀, ½ and x² — “quoted” … end   ",
    "   leading\n\n\n   THEY'LL'VE we're 007 + 3.14e-10 == <|x|>",
)


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    model: str
    type: str
    architecture: str
    megabytes: float
    codes: str
    error: float
    bound: float
    greedy: float
    tokens: int
    engine: str

    @property
    def failed(self) -> bool:
        # a greedy token may only differ where rounding of int8 activations can decide it
        enough = 1.0 if self.bound == EXACT else 0.8
        good = self.error <= self.bound and self.greedy >= enough and self.tokens == 0
        return not good or self.codes != "equal"

    def cells(self) -> list[str]:
        return [
            self.model, self.type, self.architecture, f"{self.megabytes:.2f}", self.codes,
            f"{self.error:.1e}", f"{self.bound:.0e}", f"{self.greedy:.0%}", str(self.tokens),
            self.engine, "FAILED" if self.failed else "ok",
        ]  # fmt: skip


HEADER = ["model", "type", "architecture", "MB", "codes", "logits off by", "allowed", "greedy",
          "odd token ids", "engine", ""]  # fmt: skip


# ------------------------------------------------------------------------------------ the engines


class Llama:
    """llama.cpp with an fp32 cache: its default f16 would hide errors below 1e-3."""

    def __init__(self, path: Path) -> None:
        import llama_cpp

        self.model = llama_cpp.Llama(
            str(path), n_ctx=0, n_batch=512, logits_all=True, verbose=False,
            n_threads=os.cpu_count(), type_k=0, type_v=0, flash_attn=False,
        )  # fmt: skip

    def logits(self, ids: Sequence[int]) -> np.ndarray:
        self.model.reset()
        self.model.eval(ids)
        return np.array(self.model.scores[: len(ids)])

    def tokens(self, text: str) -> list[int]:
        return list(self.model.tokenize(text.encode(), add_bos=True, special=False))

    def close(self) -> None:
        self.model.close()


def relative_rms(found: np.ndarray, expected: np.ndarray) -> float:
    """RMS of the difference over the RMS of what is expected."""
    return float(np.sqrt(((found - expected) ** 2).mean() / (expected**2).mean()))


def agreement(found: np.ndarray, expected: np.ndarray) -> float:
    """Share of positions where the most likely token is the same."""
    return float((found.argmax(-1) == expected.argmax(-1)).mean())


# -------------------------------------------------------------------------------------- the proofs


@dataclass
class Subject:
    """A model to be exported, and text to run it on."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    def ids(self) -> list[int]:
        length = min(128, self.model.config.max_position_embeddings)
        ids = [i for text in SAMPLES for i in self.tokenizer.encode(text)]
        return (ids * (1 + length // len(ids)))[:length]

    @torch.no_grad()
    def logits(self, int8: bool, tables: str = "f32") -> np.ndarray:
        """Logits in transformers, with activations as in training or in floating point, and with
        embeddings and head rounded as a file of float type `tables` has them."""
        model = copy.deepcopy(self.model).eval() if int8 else dequantized(self.model)
        for name, parameter in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "lm_head.weight")) and tables == "f16":
                parameter.copy_(parameter.half().float())
        return model(torch.tensor([self.ids()])).logits[0].float().numpy()


def codes_of(subject: Subject, path: Path, kind: str) -> str:
    """`equal`, or what the unpacked file has that training has not."""
    planned = plan(subject.model, kind)
    try:
        check_gguf(path, entries(subject.model, planned), planned)
    except (RuntimeError, UserError) as error:
        return str(error)
    return "equal"


def prove(subject: Subject, path: Path, kind: str) -> Iterator[Row]:
    """The rows of one file."""
    file = read_gguf(path)
    common = {
        "model": subject.name,
        "type": kind,
        "architecture": file.fields["general.architecture"],
        "megabytes": path.stat().st_size / 1e6,
        "codes": codes_of(subject, path, kind),
    }
    if kind == "i2_s":
        yield from _prove_i2_s(subject, path, common)
        return
    llama = Llama(path)
    odd = sum(llama.tokens(text) != subject.tokenizer.encode(text) for text in SAMPLES)
    found = llama.logits(subject.ids())
    llama.close()
    # TQ quantises activations, as training does; the float types do not
    expected = subject.logits(int8=kind.startswith("tq"))
    yield Row(
        **common,
        error=relative_rms(found, expected),
        bound=_bound(subject.model, kind),
        greedy=agreement(found, expected),
        tokens=odd,
        engine="llama.cpp",
    )


def _bound(model: PreTrainedModel, kind: str) -> float:
    experts = experts_of(model.config)
    chooses = experts is not None and experts.router == "top_k"
    return EXACT if kind == "f32" else REROUTED if chooses else ROUNDED[kind]


def _prove_i2_s(subject: Subject, path: Path, common: dict[str, Any]) -> Iterator[Row]:
    """Once in floating point, where everything but the kernel must agree, once with the kernel."""
    error = _kernel_error(subject, path)
    yield Row(
        **common, error=error, bound=EXACT, greedy=1.0, tokens=0, engine="NumPy, kernel alone"
    )
    for int8, bound in ((False, EXACT), (True, 5e-2)):
        found = Engine(path, int8).logits(subject.ids())
        expected = subject.logits(int8, tables="f16")
        yield Row(
            **common,
            error=relative_rms(found, expected),
            bound=bound,
            greedy=agreement(found, expected),
            tokens=0,
            engine="NumPy, int8 kernel" if int8 else "NumPy, float",
        )


def _kernel_error(subject: Subject, path: Path) -> float:
    """Largest error in a layer of bitnet.cpp's I2_S kernel, on the file's bytes."""
    planned, worst = plan(subject.model, "i2_s"), 0.0
    file, layout = read_gguf(path), planned.layout
    for entry in entries(subject.model, planned):
        if not entry.layers:
            continue
        (layer,) = entry.layers  # experts have no i2_s
        rows, columns = PROJECTION_AXES[entry.projection]
        x = np.random.default_rng(0).standard_normal((8, layer.in_features), np.float32)
        padded = np.zeros((8, layout.size(columns)), np.float32)
        padded[:, layout.index(columns)] = x
        codes, scale = i2_s_codes(file.raw(entry.name), int(np.prod(entry.shape)))
        found = i2_s_product(padded, codes.reshape(entry.shape), scale)[:, layout.index(rows)]
        bare = BitLinear(layer.in_features, layer.out_features)
        bare.weight = layer.weight
        worst = max(worst, relative_rms(found, bare(torch.from_numpy(x)).detach().numpy()))
    return worst


def prove_alone(path: Path) -> Row:
    """A file whose model is not at hand: its codes are codes, and its logits are numbers."""
    file = read_gguf(path)
    kind = next(k.name for k in FILE_TYPES.values() if k.file_type == file.fields[FILE_TYPE_KEY])
    ids = list(range(2, 66))
    if kind == "i2_s":
        logits, engine = Engine(path, int8=True).logits(ids), "NumPy, int8 kernel"
    else:
        llama = Llama(path)
        logits, engine = llama.logits(ids), "llama.cpp"
        llama.close()
    finite = bool(np.isfinite(logits).all()) and float(logits.std()) > 0
    size = path.stat().st_size / 1e6
    return Row(
        path.name, kind, file.fields["general.architecture"], size, _well_formed(file),
        0.0 if finite else float("inf"), EXACT, 1.0, 0, engine,
    )  # fmt: skip


def _well_formed(file: GGUF) -> str:
    for name, record in file.tensors.items():
        if record.kind.ternary:
            codes, scales = unpack(file.raw(name), record.shape, record.kind)
            if codes.max() > 1 or len(np.unique(scales)) != 1:
                return f"{name}: codes up to {codes.max()}, {len(np.unique(scales))} scales"
    return "equal"


# -------------------------------------------------------------------------------------- the program


def rows_of(subject: Subject) -> Iterator[Row]:
    """Export to every type that can hold the model, and prove each."""
    for kind in GGUF_TYPES:
        if reason := can_export(subject.model, kind):
            print(f"{subject.name}: not as {kind}: {reason}")
            continue
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "model.gguf"
            write_gguf(subject.model, subject.tokenizer, path, kind)
            yield from prove(subject, path, kind)


def all_rows(words: Sequence[str]) -> Iterator[Row]:
    """The rows for the arguments given."""
    checkpoints = [word.removeprefix("checkpoint=") for word in words if not word.endswith(".gguf")]
    files = [Path(word) for word in words if word.endswith(".gguf")]
    if len(checkpoints) > 1 and files:
        raise UserError("name one checkpoint, with the files made from it")
    subjects = [Subject(Path(c).name, load_model(c), load_tokenizer(c)) for c in checkpoints]
    for file in files:
        if subjects:
            number = read_gguf(file).fields[FILE_TYPE_KEY]
            kind = next(k.name for k in FILE_TYPES.values() if k.file_type == number)
            yield from prove(subjects[0], file, kind)
        else:
            yield prove_alone(file)
    if not files:
        for subject in subjects or (
            Subject(name, *make_model(name)) for name in (*MADE, *WITH_EXPERTS)
        ):
            yield from rows_of(subject)


def show(rows: Sequence[Row]) -> None:
    """Print one table."""
    table = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[i]) for line in table) for i in range(len(HEADER))]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="*", help="checkpoint=DIR and FILE.gguf")
    try:
        rows = list(all_rows(parser.parse_args().what))
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    show(rows)
    failed = [row for row in rows if row.failed]
    print(f"{len(rows) - len(failed)} of {len(rows)} proofs hold")
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())

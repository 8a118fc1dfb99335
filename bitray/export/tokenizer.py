"""GGUF's tokenizer fields of a byte-level BPE tokenizer, such that llama.cpp gives the same ids.

llama.cpp has the pre-tokenizers' regular expressions compiled in, under names. So the tokenizer's
own definition is compared with those known to be the same; another one is refused, because a nearly
right one costs quality that nobody sees.
"""

import json
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from bitray.settings import UserError

NORMAL, CONTROL, USER_DEFINED, UNUSED = 1, 3, 4, 5

SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How Qwen and Llama 3 split text; they differ in the number of digits taken together."""
_SPLITS = {SPLIT % "": "qwen2", SPLIT % "{1,3}": "llama-bpe"}


@dataclass(frozen=True)
class TokenizerFields:
    """What goes under `tokenizer.ggml.*`; `tokens` and `types` have one entry per embedding row."""

    pre: str
    tokens: list[str]
    types: list[int]
    merges: list[str]
    special: dict[str, int]
    add_bos: bool
    add_eos: bool
    chat_template: str | None


def tokenizer_fields(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> TokenizerFields:
    """The fields for a model with `vocab_size` embedding rows.

    Raises UserError when llama.cpp could not reproduce the tokenizer, or when it has more ids than
    the model has embeddings.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"tokenizer: GGUF needs a fast tokenizer, not {type(tokenizer).__name__}")
    definition = json.loads(backend.to_str())
    pre = _pre(definition)
    tokens, types = _tokens(tokenizer, definition, vocab_size)
    add_bos, add_eos = _added(tokenizer)
    template = tokenizer.chat_template
    return TokenizerFields(
        pre=pre,
        tokens=tokens,
        types=types,
        merges=[m if isinstance(m, str) else " ".join(m) for m in definition["model"]["merges"]],
        special=_special(tokenizer),
        add_bos=add_bos,
        add_eos=add_eos,
        chat_template=template if isinstance(template, str) else None,
    )


def _pre(definition: dict[str, Any]) -> str:
    """llama.cpp's name of the pre-tokenizer."""
    model = definition["model"]
    other = ("byte_fallback", "continuing_subword_prefix", "end_of_word_suffix")
    if model["type"] != "BPE" or any(model.get(option) for option in other):
        raise UserError("tokenizer: only byte-level BPE tokenizers can be written to GGUF")
    parts = definition["pre_tokenizer"] or {}
    steps = parts.get("pretokenizers", [parts])
    name = _known([_step(step) for step in steps])
    normalizer = (definition["normalizer"] or {}).get("type")
    # llama.cpp normalises nothing; Qwen's NFC changes only text that is not in NFC already
    merges_fit = not model.get("ignore_merges") or name == "llama-bpe"
    if name is None or normalizer not in (None, "NFC") or not merges_fit:
        described = json.dumps({k: definition[k] for k in ("normalizer", "pre_tokenizer")})
        raise UserError(f"tokenizer: llama.cpp has no pre-tokenizer equal to {described}")
    return name


def _step(step: dict[str, Any]) -> str:
    """A pre-tokenizing step in one word, or its whole definition if it is none of those known."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step["add_prefix_space"]:
        return "regex+bytes" if step["use_regex"] else "bytes"
    if kind == "Digits" and step["individual_digits"]:
        return "digits"
    if kind == "Split" and step["behavior"] == "Isolated" and not step["invert"]:
        return step["pattern"].get("Regex", "")
    return json.dumps(step)


def _known(steps: list[str]) -> str | None:
    if steps == ["regex+bytes"]:
        return "gpt-2"
    if steps == ["digits", "regex+bytes"]:
        return "smollm"
    if len(steps) == 2 and steps[1] == "bytes":
        return _SPLITS.get(steps[0])
    return None


def _tokens(
    tokenizer: PreTrainedTokenizerBase, definition: dict[str, Any], vocab_size: int
) -> tuple[list[str], list[int]]:
    """Token texts and types by id; ids without a token become unused placeholders."""
    by_id = {number: token for token, number in tokenizer.get_vocab().items()}
    if max(by_id) >= vocab_size:
        raise UserError(
            f"tokenizer: id {max(by_id)} has no embedding; the model has {vocab_size} of them"
        )
    added = {
        entry["id"]: CONTROL if entry["special"] else USER_DEFINED
        for entry in definition["added_tokens"]
    }
    tokens = [by_id.get(i, f"[PAD{i}]") for i in range(vocab_size)]
    types = [added.get(i, NORMAL) if i in by_id else UNUSED for i in range(vocab_size)]
    return tokens, types


def _special(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """Ids under GGUF's names. Without a BOS llama.cpp would take id 11, so EOS stands in for it."""
    eos, bos = tokenizer.eos_token_id, tokenizer.bos_token_id
    ids = {
        "bos": eos if bos is None else bos,
        "eos": eos,
        "padding": tokenizer.pad_token_id,
        "unknown": tokenizer.unk_token_id,
        "mask": tokenizer.mask_token_id,
    }
    return {name: number for name, number in ids.items() if number is not None}


def _added(tokenizer: PreTrainedTokenizerBase) -> tuple[bool, bool]:
    """Whether encoding puts BOS before and EOS behind a text, as observed."""
    bare = tokenizer.encode("a", add_special_tokens=False)
    full = tokenizer.encode("a")
    if full == bare:
        return False, False
    start = full[:1] == [tokenizer.bos_token_id] and full[1 : 1 + len(bare)] == bare
    end = full[-1:] == [tokenizer.eos_token_id] and len(full) == len(bare) + start + 1
    if full != full[:start] + bare + (full[-1:] if end else []):
        raise UserError(
            f"tokenizer: it turns 'a' into {full}, which is more than BOS and EOS around {bare}"
        )
    return start, end

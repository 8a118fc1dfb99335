"""What a server speaks with: one small interface over our own checkpoints and GGUF files."""

import os
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bitray.inference import generation
from bitray.inference.diffusion import diffuse
from bitray.inference.settings import Diffusion, Sampling
from bitray.models.mask_token import known_mask_token
from bitray.nn.frozen import freeze
from bitray.settings import UserError

Message = dict[str, str]
"""`role` and `content` of one turn of a conversation."""

Generate = Callable[[PreTrainedModel, list[int], Sampling, int | None], Iterator[int]]
"""New token ids of a model after a prompt's, ending before the end-of-text token."""


def _by_blocks(
    model: PreTrainedModel, ids: list[int], sampling: Sampling, end: int | None
) -> Iterator[int]:
    return diffuse(model, ids, sampling, Diffusion(), end)


GENERATORS: dict[str, Generate] = {
    "autoregressive": generation.tokens,
    "diffusion": _by_blocks,
}
"""Ways to generate from a checkpoint, by mode."""


@runtime_checkable
class Engine(Protocol):
    """A model that is asked in token ids. It answers one question at a time."""

    context: int
    """Positions for prompt and answer together."""
    vocabulary: int
    """Number of token ids."""

    def encode(self, text: str) -> list[int]:
        """Ids of a prompt, at least one."""

    def chat(self, messages: Sequence[Message]) -> list[int]:
        """Ids of a conversation that the model is to continue; `UserError` without a template."""

    def tokens(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
        """New ids, `max_new_tokens` of them or fewer."""

    def decode(self, ids: list[int]) -> str:
        """Their text, without special tokens; U+FFFD where a character is not complete."""


class CheckpointEngine:
    """A model of ours or of Hugging Face, by our own generation. It keeps the model, without the
    master weights of a ternary one."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, mode: str
    ) -> None:
        if mode == "diffusion":
            known_mask_token(model.config)
        self.generate = GENERATORS[mode]
        freeze(model)
        self.model, self.tokenizer = model.eval(), tokenizer
        self.context = model.config.max_position_embeddings
        self.vocabulary = model.config.vocab_size

    def encode(self, text: str) -> list[int]:
        return generation.prompt_ids(self.tokenizer, text)

    def chat(self, messages: Sequence[Message]) -> list[int]:
        if not self.tokenizer.chat_template:
            raise UserError(_NO_TEMPLATE.format("tokenizer"))
        text = self.tokenizer.apply_chat_template(
            list(messages), tokenize=False, add_generation_prompt=True
        )
        return self.encode(str(text))

    def tokens(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
        return self.generate(self.model, ids, sampling, self.tokenizer.eos_token_id)

    def decode(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


_NO_TEMPLATE = (
    "messages: the model's {} has no chat template; use /v1/completions, whose prompt goes to the "
    "model as it is"
)


def require_llama_cpp() -> Any:
    """llama-cpp-python, or a `UserError` that names it."""
    try:
        import llama_cpp
    except ImportError:
        raise UserError(
            "GGUF files run through llama-cpp-python, which is not installed: "
            "pip install 'bitray[verify]' builds it in minutes"
        ) from None
    return llama_cpp


class GGUFEngine:
    """A GGUF file in llama.cpp. `context=None`: all positions that the model was made for."""

    def __init__(self, path: str | Path, context: int | None = None, **options: Any) -> None:
        self.llama_cpp = require_llama_cpp()
        try:
            self.llama = self.llama_cpp.Llama(
                str(path), n_ctx=context or 0, verbose=False,
                **{"n_threads": os.cpu_count(), **options},
            )  # fmt: skip
        except ValueError as error:
            raise UserError(
                f"{path}: llama.cpp cannot load it (of the types that bitray writes it reads all "
                f"but i2_s, which is for bitnet.cpp): {error}"
            ) from None
        self.context, self.vocabulary = self.llama.n_ctx(), self.llama.n_vocab()

    def encode(self, text: str) -> list[int]:
        ids = self.llama.tokenize(text.encode(), add_bos=True, special=True)
        if ids:
            return list(ids)
        start = next((i for i in (self.llama.token_bos(), self.llama.token_eos()) if i >= 0), None)
        if start is None:
            raise UserError("prompt: it is empty, and the file names no token to start from")
        return [start]

    def chat(self, messages: Sequence[Message]) -> list[int]:
        from llama_cpp.llama_chat_format import Jinja2ChatFormatter

        template = self.llama.metadata.get("tokenizer.chat_template")
        if not template:
            raise UserError(_NO_TEMPLATE.format("file"))
        formatter = Jinja2ChatFormatter(
            template, eos_token=self._text_of("eos"), bos_token=self._text_of("bos")
        )
        said: Any = list(messages)  # typed more narrowly there
        prompt = formatter(messages=said).prompt
        return list(self.llama.tokenize(prompt.encode(), add_bos=False, special=True))

    def _text_of(self, kind: str) -> str:
        """A special token's text, for templates that write it out."""
        number = int(self.llama.metadata.get(f"tokenizer.ggml.{kind}_token_id", -1))
        return "" if number < 0 else self.llama.detokenize([number], special=True).decode()

    def tokens(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
        if len(ids) + sampling.max_new_tokens > self.context:
            raise UserError(
                f"prompt of {len(ids)} tokens and max_new_tokens={sampling.max_new_tokens} do not "
                f"fit into the cache's {self.context} positions"
            )
        self.llama.set_seed(sampling.seed)
        drawn = self.llama.generate(
            ids,
            temp=sampling.temperature,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=0.0,
            repeat_penalty=1.0,
        )
        for token in islice(drawn, sampling.max_new_tokens):
            if self.llama_cpp.llama_vocab_is_eog(self.llama._model.vocab, token):
                return
            yield token

    def decode(self, ids: list[int]) -> str:
        return str(self.llama.detokenize(ids).decode("utf-8", errors="replace"))

"""The part of OpenAI's completions interface that is served: what may be asked, and the answers.

A field that would change an answer and is not here is refused, not ignored.
"""

import random
import time
import uuid
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, NamedTuple

from pydantic import AliasChoices, Field, model_validator

from bitray.inference.engines import Engine
from bitray.inference.settings import Sampling
from bitray.settings import Settings, UserError


class StreamOptions(Settings):
    """Extras of a stream."""

    include_usage: bool = False
    """Send the counts of tokens before the end."""


class Ask(Settings):
    """What both kinds of completion take."""

    kind: ClassVar[str]
    chunk: ClassVar[str]
    """`object` of a whole answer, and of a part of a stream."""

    model: str | None = None
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float = Field(default=1.0, ge=0, le=2)
    top_p: float = Field(default=1.0, gt=0, le=1)
    top_k: int = Field(default=0, ge=0)
    """Not OpenAI's: only the k most likely tokens; 0 for all."""
    seed: int | None = Field(default=None, ge=0, lt=2**32)
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    n: Literal[1] = 1
    user: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, values: Any) -> Any:
        """Clients send the neutral values of fields that they do not use."""
        if not isinstance(values, dict):
            return values
        names = {*cls.model_fields, "max_completion_tokens"}
        return {k: v for k, v in values.items() if k in names or v not in (None, 0, False, {}, [])}

    @property
    def stops(self) -> list[str]:
        """Texts that end an answer and are no part of it."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [text for text in given if text]

    def sampling(self, room: int) -> Sampling:
        """How to draw; as long as there is room where no length is given."""
        return Sampling(
            max_new_tokens=self.max_tokens or max(room, 1),
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            seed=random.getrandbits(32) if self.seed is None else self.seed,
        )

    def ids(self, engine: Engine) -> list[int]:
        """What the model is to continue."""
        raise NotImplementedError

    def content(self, text: str, part: bool, first: bool) -> dict[str, Any]:
        """Where text goes in a choice: in a whole answer, or in a part of a stream."""
        raise NotImplementedError


class CompletionRequest(Ask):
    """Body of `/v1/completions`. A prompt is a text or token ids."""

    kind = chunk = "text_completion"

    prompt: str | list[int]
    max_tokens: int | None = Field(default=16, ge=1)

    def ids(self, engine: Engine) -> list[int]:
        """Of the prompt."""
        if isinstance(self.prompt, str):
            return engine.encode(self.prompt)
        if not self.prompt or not all(0 <= i < engine.vocabulary for i in self.prompt):
            raise UserError(f"prompt: token ids are one or more of 0 to {engine.vocabulary - 1}")
        return self.prompt

    def content(self, text: str, part: bool, first: bool) -> dict[str, Any]:
        """The same either way."""
        return {"text": text}


class Turn(Settings):
    """One message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str


class ChatRequest(Ask):
    """Body of `/v1/chat/completions`."""

    kind, chunk = "chat.completion", "chat.completion.chunk"

    messages: list[Turn] = Field(min_length=1)
    max_tokens: int | None = Field(
        default=None, ge=1, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )

    def ids(self, engine: Engine) -> list[int]:
        """Of the conversation, in the model's own template."""
        return engine.chat([turn.model_dump() for turn in self.messages])

    def content(self, text: str, part: bool, first: bool) -> dict[str, Any]:
        """A message, or what is added to it."""
        role = {} if part and not first else {"role": "assistant"}
        return {"delta" if part else "message": {**role, "content": text}}


# ------------------------------------------------------------------------------------------ answers


Finish = Literal["stop", "length"]


class Piece(NamedTuple):
    """Text that is ready to be sent, why it was the last, and tokens drawn so far."""

    text: str
    finish: Finish | None
    tokens: int


def speak(
    engine: Engine, ids: list[int], sampling: Sampling, stops: Sequence[str]
) -> Generator[Piece]:
    """An answer in pieces, the last of which says why it ends.

    Text that may yet turn out otherwise is held back: an incomplete character, or what may be the
    beginning of a stop.
    """
    drawn: list[int] = []
    sent = 0
    for token in engine.tokens(ids, sampling):
        drawn.append(token)
        text = engine.decode(drawn)
        ends = [at for stop in stops if (at := text.find(stop)) >= 0]
        if ends:
            yield Piece(text[sent : min(ends)], "stop", len(drawn))
            return
        ready = _settled(text, stops)
        if ready > sent:
            yield Piece(text[sent:ready], None, len(drawn))
            sent = ready
    finish: Finish = "length" if len(drawn) == sampling.max_new_tokens else "stop"
    yield Piece(engine.decode(drawn)[sent:], finish, len(drawn))


def _settled(text: str, stops: Sequence[str]) -> int:
    """How much of a text no further token can change."""
    whole = len(text.rstrip("\ufffd"))
    most = max((len(stop) for stop in stops), default=1) - 1
    for held in range(min(most, whole), 0, -1):
        if any(stop.startswith(text[whole - held : whole]) for stop in stops):
            return whole - held
    return whole


@dataclass(frozen=True)
class Answer:
    """Puts pieces into the form that clients know."""

    ask: Ask
    model: str
    prompt_tokens: int
    id: str = field(default_factory=lambda: f"cmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self, tokens: int) -> dict[str, int]:
        """Counts of tokens."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": tokens,
            "total_tokens": self.prompt_tokens + tokens,
        }

    def whole(self, text: str, last: Piece) -> dict[str, Any]:
        """The one answer to a request that is not streamed."""
        choices = [self._choice(self.ask.content(text, False, True), last.finish)]
        return {**self._head(self.ask.kind), "choices": choices, "usage": self.usage(last.tokens)}

    def part(self, piece: Piece, first: bool) -> dict[str, Any]:
        """One event of a stream."""
        choices = [self._choice(self.ask.content(piece.text, True, first), piece.finish)]
        return {**self._head(self.ask.chunk), "choices": choices}

    def end(self, last: Piece) -> dict[str, Any]:
        """The event with the counts, for those who ask for it."""
        return {**self._head(self.ask.chunk), "choices": [], "usage": self.usage(last.tokens)}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    @staticmethod
    def _choice(content: dict[str, Any], finish: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": finish}

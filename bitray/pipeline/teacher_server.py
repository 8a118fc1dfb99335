"""A teacher behind vLLM's OpenAI-compatible server (`/v1/completions` with `prompt_logprobs`).

For every token of a prompt it gives the log-probabilities, at temperature 1, of the likeliest
tokens in its place, by id. What stands at token p is what the model predicted *for* p, so it
belongs to position p - 1. A server knows no packed rows: every document is asked about alone.
"""

import http.client
import itertools
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from bitray.models.batch import IGNORED, Batch
from bitray.models.sparse import TopK
from bitray.settings import Passing, UserError
from bitray.training.teacher_settings import Server

KEY = "VLLM_API_KEY"
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
"""Seconds between tries."""
IDS_AT_A_TIME = 4096
TRY_AGAIN = (408, 425, 429)
Entries = list[dict[str, dict[str, Any]] | None]


class Client:
    """Asks a server, again where that may help. `UserError` where it does not."""

    def __init__(self, settings: Server, model: str | None = None) -> None:
        self.settings = settings
        self.model: str = model or settings.model or self._only_model()

    def completion(self, **body: Any) -> dict[str, Any]:
        """The first choice of a completion."""
        told = self._ask("completions", {"model": self.model, **body})
        choice: dict[str, Any] = told["choices"][0]
        return choice

    def text(self, ids: list[int]) -> str:
        """What the server's tokenizer makes of ids."""
        body = {"model": self.model, "tokens": ids}
        return str(self._ask("../detokenize", body)["prompt"])

    def _only_model(self) -> str:
        names = [str(each["id"]) for each in self._ask("models")["data"]]
        if len(names) != 1:
            raise UserError(
                f"model.teacher.model: {self.settings.url} serves {', '.join(names) or 'nothing'}; "
                "say which is the teacher"
            )
        return names[0]

    def _ask(self, what: str, body: Mapping[str, Any] | None = None) -> Any:
        url = f"{self.settings.url}/{what}".replace("/v1/../", "/")
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request, why = urllib.request.Request(url, data, headers), ""
        for attempt in range(self.settings.attempts):
            time.sleep(min(FIRST_WAIT * 2 ** (attempt - 1), LONGEST_WAIT) if attempt else 0)
            try:
                with urllib.request.urlopen(request, timeout=self.settings.timeout) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                why = f"{error.code}: {_message(error)}"
                if error.code < 500 and error.code not in TRY_AGAIN:
                    raise UserError(f"model.teacher: {url} refuses with {why}") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                why = str(getattr(error, "reason", error)) or type(error).__name__
        raise Passing(
            f"model.teacher.url: {url} does not answer after {self.settings.attempts} tries "
            f"({why}); once it runs again, the same command continues the run"
        )


def _message(error: urllib.error.HTTPError) -> str:
    """The server's own sentence, which vLLM gives in one of two places."""
    text = error.read().decode(errors="replace")
    try:
        told = json.loads(text)
        return str(told.get("error", told).get("message", text))
    except (ValueError, AttributeError):
        return text[:200] or str(error.reason)


def checked(settings: Server, mine: PreTrainedTokenizerBase) -> Client:
    """A client of a server whose tokenizer gives every id the text that the student's does;
    `UserError` with the first id that differs."""
    client = Client(settings)
    highest = 1 + max(mine.get_vocab().values())
    for start in range(0, highest, IDS_AT_A_TIME):
        ids = list(range(start, min(start + IDS_AT_A_TIME, highest)))
        if client.text(ids) == mine.decode(ids):
            continue
        while len(ids) > 1:  # the first id that differs lies in the first half that differs
            half = ids[: len(ids) // 2]
            ids = half if client.text(half) != mine.decode(half) else ids[len(half) :]
        token = mine.convert_ids_to_tokens(ids[0])
        raise UserError(
            f"model.teacher: {client.model} at {client.settings.url} has another tokenizer than "
            f"the student: the first id that differs is {ids[0]}, the student's {token!r}"
        )
    return client


# -------------------------------------------------------------------------------------- answers


class Document(NamedTuple):
    """Where a document lies in a batch, and its tokens."""

    row: int
    start: int
    ids: list[int]


def documents(batch: Batch) -> Iterator[Document]:
    """Those of which a token is learnt; padding is none of them."""
    for row in range(len(batch.input_ids)):
        ids = batch.input_ids[row][batch.real[row]].tolist()
        starts = (batch.position_ids[row][: len(ids)] == 0).nonzero().flatten().tolist()
        for start, end in itertools.pairwise([*starts, len(ids)]):
            if bool((batch.labels[row, start + 1 : end] != IGNORED).any()):
                yield Document(row, start, ids[start:end])


class ServerTeacher:
    """Asks about the documents of a batch, several at a time."""

    def __init__(self, client: Client, vocabulary: int) -> None:
        self.client, self.vocabulary = client, vocabulary
        self.k = min(client.settings.top_k, vocabulary)
        self.threads = ThreadPoolExecutor(client.settings.concurrency, "teacher")

    def ask(self, batch: Batch) -> Callable[[], TopK]:
        """Begin; what is returned waits and puts the answers together."""
        asked = [(each, self.threads.submit(self.about, each.ids)) for each in documents(batch)]
        rows, length = batch.input_ids.shape

        def wait() -> TopK:
            answer = TopK.blank(rows, length, self.k, min(self.k + 1, self.vocabulary), 1.0)
            for document, future in asked:
                ids, logp = future.result()
                at = slice(document.start, document.start + len(ids))
                answer.ids[document.row, at] = ids
                answer.logp[document.row, at] = logp
            return answer

        return wait

    def close(self) -> None:
        """Ask no more: what is waiting is dropped."""
        self.threads.shutdown(wait=False, cancel_futures=True)

    def about(self, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """What is predicted after each token of a document but the last: [n-1, k], [n-1, kept]."""
        told = self.client.completion(prompt=ids, max_tokens=1, prompt_logprobs=self.k)
        entries: Entries = told.get("prompt_logprobs") or []
        if len(entries) != len(ids):
            raise self._wrong(
                f"gave log-probabilities of {len(entries)} tokens of a document of {len(ids)}; "
                "start it with --no-enable-prefix-caching"
            )
        pairs = [self._likeliest(*each) for each in zip(ids[1:], entries[1:], strict=True)]
        found = torch.tensor([[token for token, _ in row] for row in pairs], dtype=torch.int32)
        logp = torch.tensor([[value for _, value in row] for row in pairs])
        if self.k < self.vocabulary:
            rest = 1 - logp.double().exp().sum(-1, keepdim=True)
            tiny = torch.finfo(torch.float32).tiny  # rounding may leave less than nothing
            logp = torch.cat([logp, rest.clamp_min(tiny).log().float()], -1)
        return found, logp

    def _likeliest(
        self, token: int, entry: dict[str, dict[str, Any]] | None
    ) -> list[tuple[int, float]]:
        """Ids and log-probabilities; the token itself is told even if it is not among them."""
        if not entry or str(token) not in entry:
            raise self._wrong(f"says nothing about token {token}, which it was sent")
        pairs = [(int(at), float(told["logprob"])) for at, told in entry.items()]
        pairs = sorted(pairs, key=lambda pair: -pair[1])[: self.k]
        highest = max(at for at, _ in pairs)
        if highest >= self.vocabulary:
            raise self._wrong(f"speaks of token {highest}; the student has {self.vocabulary}")
        if len(pairs) < self.k:
            raise self._wrong(f"told {len(pairs)} likeliest tokens, not {self.k}")
        return pairs

    def _wrong(self, what: str) -> UserError:
        return UserError(f"model.teacher: the server at {self.client.settings.url} {what}")

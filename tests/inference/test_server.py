"""The server by real requests: a tiny checkpoint, and the same model as a GGUF file in llama.cpp.

Answers are compared with what the engine's model says when it is asked without a server.
"""

import asyncio
import copy
import http.client
import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from aiohttp import web
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from bitray.data.tokenizer import train_tokenizer
from bitray.export import write_gguf
from bitray.inference import Diffusion, Sampling
from bitray.inference.diffusion import diffuse
from bitray.inference.engines import CheckpointEngine, Engine, GGUFEngine
from bitray.inference.generation import generate, tokens
from bitray.inference.protocol import speak
from bitray.inference.server import Server, listen
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.models.mask_token import add_mask_token
from bitray.nn import bit_linears
from bitray.settings import UserError

TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
POSITIONS = 96
CONFIG = {
    "model_type": "llama", "vocab_size": 280, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS, "initializer_range": 0.3,
}  # fmt: skip
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    made = train_tokenizer(["def words(text):\n    return text.split()\n"] * 3, 280)
    made.chat_template = TEMPLATE
    return made


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    """Dense: llama.cpp's rounding of activations would draw other tokens."""
    torch.manual_seed(0)
    return build_model(CONFIG)


@pytest.fixture(scope="module", params=["checkpoint", "gguf"])
def engine(
    request: pytest.FixtureRequest,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path_factory: pytest.TempPathFactory,
) -> Engine:
    if request.param == "checkpoint":
        return CheckpointEngine(model, tokenizer, "autoregressive")
    pytest.importorskip("llama_cpp")
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(model, tokenizer, path, "f32")
    return GGUFEngine(path, n_threads=1, type_k=0, type_v=0, flash_attn=False)


class Running(NamedTuple):
    """A server that answers in another thread."""

    url: str

    def ask(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """Status and JSON (or the text of a stream)."""
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {**JSON, **headers})
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                text = answer.read().decode()
                streamed = answer.headers.get_content_type() == "text/event-stream"
                return answer.status, text if streamed else json.loads(text)
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    def events(self, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
        """The events of a stream, which has to end as streams do."""
        status, text = self.ask(path, {**body, "stream": True})
        assert status == 200 and isinstance(text, str)
        *events, end = [line.removeprefix("data: ") for line in text.split("\n\n") if line]
        assert end == "[DONE]"
        return [json.loads(event) for event in events]


def start(engine: Engine, token: str | None = None) -> Iterator[Running]:
    """A server on a free port of loopback."""
    sock, ready = listen("127.0.0.1", 0, token), threading.Event()
    loop = asyncio.new_event_loop()

    async def begin() -> web.AppRunner:
        runner = web.AppRunner(Server(engine, "tiny", token).app(), handler_cancellation=True)
        await runner.setup()
        await web.SockSite(runner, sock).start()
        return runner

    def run() -> None:
        runner = loop.run_until_complete(begin())
        ready.set()
        loop.run_forever()
        loop.run_until_complete(runner.cleanup())
        loop.close()

    thread = threading.Thread(target=run)
    thread.start()
    assert ready.wait(10)
    yield Running(f"http://127.0.0.1:{sock.getsockname()[1]}")
    loop.call_soon_threadsafe(loop.stop)
    thread.join()


@pytest.fixture(scope="module")
def server(engine: Engine) -> Iterator[Running]:
    yield from start(engine)


@pytest.fixture(scope="module")
def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Callable[..., str]:
    """The continuation that needs no server."""

    def say(prompt: str, count: int) -> str:
        sampling = Sampling(temperature=0, max_new_tokens=count)
        return generate(model, tokenizer, prompt, sampling)

    return say


def test_it_names_its_model(server: Running) -> None:
    status, listed = server.ask("/v1/models")
    assert status == 200 and [each["id"] for each in listed["data"]] == ["tiny"]
    assert server.ask("/v1/models/tiny") == (200, listed["data"][0])
    assert server.ask("/v1/models/huge")[0] == 404


def test_a_completion_is_the_models_own(
    server: Running, greedy: Callable[..., str], tokenizer: PreTrainedTokenizerFast
) -> None:
    body = {"model": "tiny", "prompt": "def wor", "max_tokens": 12, "temperature": 0}
    status, said = server.ask("/v1/completions", body)
    assert status == 200 and said["object"] == "text_completion" and said["model"] == "tiny"
    (choice,) = said["choices"]
    assert choice["text"] == greedy("def wor", 12) and choice["finish_reason"] == "length"
    ids = tokenizer("def wor")["input_ids"]
    assert said["usage"] == {
        "prompt_tokens": len(ids), "completion_tokens": 12, "total_tokens": len(ids) + 12
    }  # fmt: skip
    _, by_ids = server.ask("/v1/completions", {**body, "prompt": ids})
    assert by_ids["choices"] == said["choices"]


def test_a_stream_says_the_same_in_parts(server: Running) -> None:
    body = {"prompt": "return", "max_tokens": 15, "temperature": 0}
    _, whole = server.ask("/v1/completions", body)
    events = server.events("/v1/completions", {**body, "stream_options": {"include_usage": True}})
    *parts, counts = events
    assert "".join(p["choices"][0]["text"] for p in parts) == whole["choices"][0]["text"]
    assert len(parts) > 3, "it comes while it is made"
    assert [p["choices"][0]["finish_reason"] for p in parts] == [None] * (len(parts) - 1) + [
        "length"
    ]
    assert counts["choices"] == [] and counts["usage"] == whole["usage"]
    assert len({p["id"] for p in events}) == 1


def test_a_chat_is_its_template_continued(server: Running, greedy: Callable[..., str]) -> None:
    messages = [{"role": "system", "content": "a"}, {"role": "user", "content": "text"}]
    body = {"messages": messages, "max_completion_tokens": 9, "temperature": 0}
    status, said = server.ask("/v1/chat/completions", body)
    expected = greedy("<system>a\n<user>text\n<assistant>", 9)
    assert status == 200 and said["object"] == "chat.completion"
    assert said["choices"][0]["message"] == {"role": "assistant", "content": expected}
    parts = server.events("/v1/chat/completions", body)
    assert parts[0]["choices"][0]["delta"]["role"] == "assistant"
    assert all("role" not in p["choices"][0]["delta"] for p in parts[1:])
    assert "".join(p["choices"][0]["delta"]["content"] for p in parts) == expected
    # without a length it goes on for as long as there is room
    _, long = server.ask("/v1/chat/completions", {"messages": messages, "temperature": 0})
    assert long["usage"]["total_tokens"] == POSITIONS or (
        long["choices"][0]["finish_reason"] == "stop"
    )


def test_it_stops_before_a_stop(server: Running, greedy: Callable[..., str]) -> None:
    text = greedy("def", 24)
    stop = text[7:10]
    body = {"prompt": "def", "max_tokens": 24, "temperature": 0, "stop": ["never said", stop]}
    _, said = server.ask("/v1/completions", body)
    assert said["choices"][0]["text"] == text[: text.index(stop)]
    assert said["choices"][0]["finish_reason"] == "stop"
    parts = server.events("/v1/completions", body)
    assert "".join(p["choices"][0]["text"] for p in parts) == text[: text.index(stop)]


def test_a_seed_says_what_is_drawn(server: Running) -> None:
    def say(**said: Any) -> str:
        body = {"prompt": "def", "max_tokens": 16, "temperature": 1.5, **said}
        return server.ask("/v1/completions", body)[1]["choices"][0]["text"]

    assert say(seed=1) == say(seed=1) != say(seed=2)
    assert len({say() for _ in range(4)}) > 1, "without a seed it is not always the same"
    assert say(top_p=1e-6) == say(temperature=0), "the likeliest alone"


def test_many_at_once_are_answered_one_after_the_other(
    server: Running, greedy: Callable[..., str]
) -> None:
    prompts = ["def", "return", "text", "words"]
    answers: dict[str, str] = {}

    def one(prompt: str) -> None:
        body = {"prompt": prompt, "max_tokens": 10, "temperature": 0}
        answers[prompt] = server.ask("/v1/completions", body)[1]["choices"][0]["text"]

    threads = [threading.Thread(target=one, args=(prompt,)) for prompt in prompts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == {prompt: greedy(prompt, 10) for prompt in prompts}


@pytest.mark.parametrize(
    ("path", "body", "status", "param", "told"),
    [
        ("/v1/completions", {"max_tokens": 3}, 400, "prompt", "Field required"),
        ("/v1/completions", {"prompt": "a", "temprature": 1}, 400, "temprature", "'temperature'"),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400, "temperature", "greater"),
        ("/v1/completions", {"prompt": "a", "n": 2}, 400, "n", "should be 1"),
        ("/v1/completions", {"prompt": "a", "logprobs": 5}, 400, "logprobs", "not know it"),
        ("/v1/completions", {"prompt": "a", "max_tokens": 500}, 400, None, "do not fit into"),
        ("/v1/completions", {"prompt": [3, 280]}, 400, None, "0 to 279"),
        ("/v1/completions", {"prompt": []}, 400, None, "0 to 279"),
        ("/v1/completions", {"prompt": "a", "model": "gpt"}, 404, "model", "'tiny' is"),
        ("/v1/completions", [1], 400, None, "body: "),
        ("/v1/chat/completions", {"messages": []}, 400, "messages", "at least 1 item"),
        ("/v1/embeddings", {"input": "a"}, 404, None, "Not Found"),
    ],
)  # fmt: skip
def test_a_bad_request_is_told_in_json(  # noqa: PLR0917 - the columns of the table
    server: Running, path: str, body: Any, status: int, param: str | None, told: str
) -> None:
    found, answer = server.ask(path, body)
    error = answer["error"]
    assert found == status and error["type"] == "invalid_request_error" and error["param"] == param
    assert told in error["message"] and "\n" not in error["message"]


@pytest.mark.parametrize("body", [b"", b"{", b'{"prompt": "\xff"}'])
def test_a_body_that_is_no_json_is_told_so(server: Running, body: bytes) -> None:
    request = urllib.request.Request(f"{server.url}/v1/completions", body, JSON)
    with pytest.raises(urllib.error.HTTPError) as caught:
        urllib.request.urlopen(request, timeout=60)
    assert caught.value.code == 400 and json.loads(caught.value.read())["error"]["message"]


def test_fields_that_ask_for_nothing_are_let_pass(server: Running) -> None:
    neutral = {"frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": None, "echo": False}
    assert server.ask("/v1/completions", {"prompt": "a", "max_tokens": 1, **neutral})[0] == 200


def test_pages_of_the_web_cannot_ask(server: Running) -> None:
    """They can send text to loopback, and can give it a name of their own, but no more."""
    body = {"prompt": "a", "max_tokens": 1}
    assert server.ask("/v1/completions", body, **{"Content-Type": "text/plain"})[0] == 415
    assert server.ask("/v1/completions", body, Host="evil.example")[0] == 403


def test_a_token_is_asked_for_where_there_is_one(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    for server in start(CheckpointEngine(model, tokenizer, "autoregressive"), "secret"):
        assert server.ask("/v1/models")[0] == 401
        assert server.ask("/v1/models", Authorization="Bearer secre")[0] == 401
        right = {"Authorization": "Bearer secret", "Host": "my.machine"}
        assert server.ask("/v1/models", **right)[0] == 200


def test_other_addresses_want_a_token_and_a_port_in_use_is_one_sentence() -> None:
    with pytest.raises(UserError, match=r"host=0\.0\.0\.0: .* set BITRAY_SERVE_TOKEN"):
        listen("0.0.0.0", 0, None)
    with listen("127.0.0.1", 0, None) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port={port}: cannot listen there"):
            listen("127.0.0.1", port, None)


def test_a_failing_model_is_an_error_in_json(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Before a stream by its status, within one by an event."""

    class Failing(CheckpointEngine):
        def tokens(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
            for count, token in enumerate(super().tokens(ids, sampling)):
                assert count < 3, "on purpose"
                yield token

    for server in start(Failing(model, tokenizer, "autoregressive")):
        body = {"prompt": "def", "max_tokens": 9, "temperature": 0}
        status, answer = server.ask("/v1/completions", body)
        assert status == 500 and answer["error"]["type"] == "server_error"
        _, text = server.ask("/v1/completions", {**body, "stream": True})
        assert '"server_error"' in text.splitlines()[-2] and "[DONE]" not in text
        assert server.ask("/v1/models")[0] == 200, "it goes on"


def test_nobody_draws_on_for_a_client_that_has_gone(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    drawn: list[int] = []

    class Slow(CheckpointEngine):
        def tokens(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
            for token in super().tokens(ids, sampling):
                time.sleep(0.02)
                drawn.append(token)
                yield token

    for server in start(Slow(model, tokenizer, "autoregressive")):
        host = server.url.removeprefix("http://")
        for stream in (True, False):
            drawn.clear()
            body = {"prompt": "def", "max_tokens": 80, "temperature": 0, "stream": stream}
            client = http.client.HTTPConnection(host, timeout=60)
            client.request("POST", "/v1/completions", json.dumps(body), JSON)
            while not drawn:
                time.sleep(0.01)
            client.close()
            short = {"prompt": "def", "max_tokens": 1}
            assert server.ask("/v1/completions", short)[0] == 200, "the next one has its turn"
            assert len(drawn) < 40


def test_text_is_sent_when_nothing_can_change_it() -> None:
    """A letter of two bytes, the beginning of a stop that comes to nothing, and one that comes."""
    said = ["a", "\ufffd", "é", "E", "N", "X", "EN", "D", "z"]
    texts = ["a", "a\ufffd", "aé", "aéE", "aéEN", "aéENX", "aéENXEN", "aéENXEND", "-"]

    class Scripted:
        context = vocabulary = 99
        encode = chat = len

        def tokens(self, ids: list[int], sampling: Sampling) -> Iterator[int]:
            yield from range(len(said))

        def decode(self, ids: list[int]) -> str:
            return texts[len(ids) - 1]

    pieces = list(speak(Scripted(), [0], Sampling(max_new_tokens=99), ["END"]))  # type: ignore[arg-type]
    assert [piece.text for piece in pieces] == ["a", "é", "ENX", ""]
    assert pieces[-1].finish == "stop" and pieces[-1].tokens == 8


@pytest.mark.parametrize("subln", ["none", "paper"])
def test_a_ternary_model_speaks_as_before_without_its_masters(
    tokenizer: PreTrainedTokenizerFast, subln: str
) -> None:
    torch.manual_seed(0)
    ternary = to_bitnet(build_model(CONFIG), subln)
    sampling = Sampling(temperature=0, max_new_tokens=20)
    expected = list(tokens(ternary, [5, 17, 60], sampling, tokenizer.eos_token_id))
    weights = sum(layer.weight.numel() for layer in bit_linears(ternary))
    engine = CheckpointEngine(ternary, tokenizer, "autoregressive")
    assert list(engine.tokens([5, 17, 60], sampling)) == expected
    kept = sum(p.numel() for p in engine.model.parameters())
    assert kept + weights == sum(
        p.numel() for p in to_bitnet(build_model(CONFIG), subln).parameters()
    )


def test_a_model_with_a_mask_token_speaks_in_blocks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    taught, speaks = to_bitnet(copy.deepcopy(model), "none"), copy.deepcopy(tokenizer)
    add_mask_token(taught, speaks)
    taught.config.diffusion_block = 4
    ids, sampling = [5, 6, 7], Sampling(temperature=0, max_new_tokens=9)
    told = list(diffuse(taught, ids, sampling, Diffusion(), None))
    engine = CheckpointEngine(taught, speaks, "diffusion")
    assert told and list(engine.tokens(ids, sampling)) == told


def test_a_model_without_a_mask_token_is_not_served_by_blocks(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast
) -> None:
    with pytest.raises(UserError, match="this model has no mask token"):
        CheckpointEngine(model, tokenizer, "diffusion")


def test_a_file_that_llama_cpp_cannot_read_is_one_sentence(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    (tmp_path / "x.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(UserError, match=r"x\.gguf: llama\.cpp cannot load it"):
        GGUFEngine(tmp_path / "x.gguf")

"""A small server on loopback that answers as vLLM's OpenAI-compatible one does, by a real model.

Layout from vLLM's source (`CompletionResponseChoice.prompt_logprobs`): a list with one entry per
token of the prompt, the first null; the others map token ids, as strings, to `logprob`, `rank`
and `decoded_token`: the k likeliest, and the prompt's own token if it is none of these.
"""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase


class VLLM:
    """Serves a model until closed. `failures` makes it answer 503 so many times first."""

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_logprobs: int = 20
    ) -> None:
        self.model, self.tokenizer, self.max_logprobs = model.eval(), tokenizer, max_logprobs
        self.names, self.failures = ["teacher"], 0
        self.prompts: list[list[int]] = []
        self.requests = 0
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.requests += 1
        if self.failures:
            self.failures -= 1
            return 503, {"error": {"message": "still loading", "code": 503}}
        if path == "/v1/models":
            return 200, {
                "object": "list",
                "data": [{"id": n, "object": "model"} for n in self.names],
            }
        if body.get("model") not in self.names:
            message = f"The model `{body.get('model')}` does not exist."
            return 404, {"error": {"message": message, "type": "NotFoundError", "code": 404}}
        if path == "/detokenize":
            return 200, {"prompt": self.tokenizer.decode(body["tokens"])}
        if path == "/v1/completions":
            return self.completion(body)
        return 404, {"detail": "Not Found"}

    def completion(self, body: dict[str, Any]) -> tuple[int, Any]:
        ids, k = body["prompt"], body.get("prompt_logprobs")
        assert body["max_tokens"] >= 1 and all(isinstance(each, int) for each in ids)
        if k > self.max_logprobs:
            message = (
                f"Requested prompt logprobs of {k}, which is greater than max allowed: "
                f"{self.max_logprobs}"
            )
            return 400, {"error": {"message": message, "type": "BadRequestError", "code": 400}}
        with self.lock:
            self.prompts.append(ids)
            with torch.no_grad():
                logp = self.model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
        entries: list[Any] = [None]
        for before, token in zip(logp, ids[1:], strict=False):
            order = before.argsort(descending=True).tolist()
            chosen = [token, *(each for each in order[:k] if each != token)]
            entries.append({
                str(each): {
                    "logprob": before[each].item(), "rank": order.index(each) + 1,
                    "decoded_token": self.tokenizer.decode([each]),
                }
                for each in chosen
            })  # fmt: skip
        choice = {
            "index": 0, "text": "x", "logprobs": None, "finish_reason": "length",
            "stop_reason": None, "prompt_logprobs": entries,
        }  # fmt: skip
        return 200, {"id": "cmpl-1", "object": "text_completion", "choices": [choice]}


def _handler(served: VLLM) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*served.answer(self.path, {}))

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*served.answer(self.path, body))

        def _send(self, code: int, told: Any) -> None:
            content = json.dumps(told).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None: ...

    return Handler

"""Serves an engine over HTTP as OpenAI does: models, completions, chat, streams of events.

It listens on loopback and answers whoever asks there, pages of the web excepted; elsewhere it wants
a token. One answer is made at a time, the others wait.
"""

import asyncio
import hmac
import json
import logging
import socket
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing
from typing import Any

from aiohttp import web
from pydantic import ValidationError

from bitray.inference.engines import Engine
from bitray.inference.protocol import Answer, Ask, ChatRequest, CompletionRequest, Piece, speak
from bitray.settings import UserError, nearest

LARGEST_BODY = 4 * 1024**2
"""Bytes of a request."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")
TOKEN = "BITRAY_SERVE_TOKEN"
"""Environment variable with what clients have to know; they send it as their API key."""


class Refusal(Exception):
    """An answer that says what is wrong with a request."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        kind = "server_error" if status >= 500 else "invalid_request_error"
        self.status = status
        self.body = {"error": {"message": message, "type": kind, "param": param, "code": code}}

    def response(self) -> web.Response:
        """As it is sent."""
        return web.json_response(self.body, status=self.status)


_FAILED = Refusal(500, "the model could not answer; the server's log says why", "failed")
_log = logging.getLogger(__name__)


class Server:
    """An engine under a name."""

    def __init__(self, engine: Engine, name: str, token: str | None = None) -> None:
        self.engine, self.name, self.token = engine, name, token
        self.turn = asyncio.Lock()
        self.worker = ThreadPoolExecutor(max_workers=1, thread_name_prefix="engine")

    def app(self) -> web.Application:
        """The routes."""
        app = web.Application(client_max_size=LARGEST_BODY, middlewares=[self._guard])
        app.router.add_get("/v1/models", self.models)
        app.router.add_get("/v1/models/{name:.+}", self.model)
        app.router.add_post("/v1/completions", self._answering(CompletionRequest))
        app.router.add_post("/v1/chat/completions", self._answering(ChatRequest))
        return app

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Who may ask; and every error as JSON."""
        try:
            self._admit(request)
            return await handler(request)
        except Refusal as refusal:
            return refusal.response()
        except web.HTTPException as error:
            told = f"{request.method} {request.path}: {error.reason}"
            return Refusal(error.status, told, "not_served").response()
        except Exception:
            _log.exception("%s %s", request.method, request.path)
            return _FAILED.response()

    def _admit(self, request: web.Request) -> None:
        if self.token is not None:
            said = request.headers.get("Authorization", "").removeprefix("Bearer ")
            if not hmac.compare_digest(said.encode(), self.token.encode()):
                raise Refusal(401, "the API key is missing or wrong", "invalid_api_key")
        elif request.url.host not in LOOPBACK:  # a page whose name was made to point here
            raise Refusal(403, f"this server has no name '{request.url.host}'", "wrong_host")
        if request.method == "POST" and request.content_type != "application/json":
            raise Refusal(415, "Content-Type: it has to be application/json", "wrong_content_type")

    # ----------------------------------------------------------------------------------- routes

    async def models(self, _: web.Request) -> web.Response:
        """What is served: one model."""
        return web.json_response({"object": "list", "data": [self._model()]})

    async def model(self, request: web.Request) -> web.Response:
        """That model."""
        self._check_name(request.match_info["name"])
        return web.json_response(self._model())

    def _model(self) -> dict[str, Any]:
        return {"id": self.name, "object": "model", "created": 0, "owned_by": "bitray"}

    def _check_name(self, name: str | None) -> None:
        if name is not None and name != self.name:
            told = f"model: '{name}' is not served here, '{self.name}' is"
            raise Refusal(404, told, "model_not_found", "model")

    def _answering(self, kind: type[Ask]) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def handle(request: web.Request) -> web.StreamResponse:
            ask = parsed(kind, await request.read())
            self._check_name(ask.model)
            async with self.turn:
                return await self._answer(request, ask)

        return handle

    async def _answer(self, request: web.Request, ask: Ask) -> web.StreamResponse:
        try:
            ids = ask.ids(self.engine)
            answer = Answer(ask, self.name, len(ids))
            async with aclosing(self._pieces(ids, ask)) as pieces:
                first = await anext(pieces)  # what is refused is refused before a stream begins
                if ask.stream:
                    return await _stream(request, answer, first, pieces)
                said = [first, *[piece async for piece in pieces]]
                text = "".join(piece.text for piece in said)
                return web.json_response(answer.whole(text, said[-1]))
        except UserError as error:
            raise Refusal(400, str(error), "invalid_value") from None

    async def _pieces(self, ids: list[int], ask: Ask) -> AsyncGenerator[Piece]:
        """Made in the worker's thread, one after the other; closed there too."""
        sampling = ask.sampling(self.engine.context - len(ids))
        pieces = speak(self.engine, ids, sampling, ask.stops)
        call = asyncio.get_running_loop().run_in_executor
        try:
            while (piece := await call(self.worker, next, pieces, None)) is not None:
                yield piece
        finally:
            await call(self.worker, pieces.close)


async def _stream(
    request: web.Request, answer: Answer, first: Piece, rest: AsyncIterator[Piece]
) -> web.StreamResponse:
    """Server-sent events, one a piece, then [DONE]."""
    response = web.StreamResponse(headers={"Cache-Control": "no-cache"})
    response.content_type = "text/event-stream"
    await response.prepare(request)

    async def send(event: dict[str, Any] | str) -> None:
        data = event if isinstance(event, str) else json.dumps(event)
        await response.write(f"data: {data}\n\n".encode())

    try:
        await send(answer.part(first, first=True))
        last = first
        async for last in rest:
            await send(answer.part(last, first=False))
        options = answer.ask.stream_options
        if options is not None and options.include_usage:
            await send(answer.end(last))
        await send("[DONE]")
    except ConnectionResetError:
        return response  # the client has gone, so nobody draws on
    except Exception:  # too late for a status
        _log.exception("a stream of %s", answer.model)
        await send(_FAILED.body)
    await response.write_eof()
    return response


def parsed(kind: type[Ask], body: bytes) -> Ask:
    """What a body asks for, or a refusal that names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"])
        told = first["msg"]
        if first["type"] == "extra_forbidden":
            told = f"this server does not know it{nearest(field, kind.model_fields)}"
        where = field or "body"
        raise Refusal(400, f"{where}: {told}", "invalid_value", field or None) from None


# ------------------------------------------------------------------------------------------ serving


def listen(host: str, port: int, token: str | None) -> socket.socket:
    """A socket to serve on; port 0 takes a free one. `UserError` where it must not or cannot."""
    if host not in LOOPBACK and not token:
        raise UserError(
            f"host={host}: whoever reaches it could use the model; set {TOKEN} in the environment "
            "to what clients have to send as their API key, or leave host at 127.0.0.1"
        )
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"host={host} port={port}: cannot listen there: {error.strerror}") from None


def serve(engine: Engine, name: str, sock: socket.socket, token: str | None) -> None:
    """Answer until somebody stops the process."""
    host, port = sock.getsockname()[:2]

    async def app() -> web.Application:  # the lock belongs to the loop that runs it
        return Server(engine, name, token).app()

    def told(_: str) -> None:
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {name} at http://{shown}:{port}/v1 (Ctrl-C ends it)", flush=True)

    web.run_app(app(), sock=sock, print=told, access_log=None, handler_cancellation=True)

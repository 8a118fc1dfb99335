"""An HTTP proxy of our own before an S3 server: it fails a share of the requests, by seed."""

import http.client
import random
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


class FlakyS3:
    """`rate` of all requests get an error: 500, 503 or a cut connection, or always `status`.
    `change(done)` is called at every request that changes something, before and after it is."""

    def __init__(self, server: str, seed: int = 0, port: int = 0) -> None:
        self.rate, self.status = 0.0, 0
        self.failed = self.passed = 0
        self.change: Callable[[bool], None] = lambda done: None
        self._random, self._lock = random.Random(seed), threading.Lock()
        target, outer = urlsplit(server).netloc, self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                body = self._body()
                fate = outer._fate()
                if fate == "cut":
                    self.close_connection = True
                    self.connection.shutdown(socket.SHUT_RDWR)
                elif fate:
                    self._answer(int(fate), {}, b"")
                else:
                    upstream = http.client.HTTPConnection(target, timeout=60)
                    whole = ((k, v) for k, v in self.headers.items())
                    headers = {k: v for k, v in whole if k.lower() != "transfer-encoding"}
                    changing = self.command not in ("GET", "HEAD")
                    if changing:
                        outer.change(False)
                    upstream.request(self.command, self.path, body, headers)
                    answer = upstream.getresponse()
                    content = answer.read()
                    if changing:
                        outer.change(True)
                    self._answer(answer.status, dict(answer.getheaders()), content)
                    upstream.close()

            do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = forward

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length") or 0))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def _answer(self, status: int, headers: dict[str, str], body: bytes) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(name, value)
                length = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(body)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else body)

            def log_message(self, *_: object) -> None: ...

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, *_: object) -> None:
                """Clients that go away in the middle are nothing to speak of."""

        self._server = Server(("127.0.0.1", port), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _fate(self) -> str:
        with self._lock:
            if self._random.random() >= self.rate:
                self.passed += 1
                return ""
            self.failed += 1
            return str(self.status or self._random.choice(["500", "503", "cut"]))

    def close(self) -> None:
        """Nobody listens at the address any more."""
        self._server.shutdown()
        self._server.server_close()

"""A stand-in for the Hugging Face Hub on loopback: commits of datasets, listed, read by range."""

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit


class Hub:
    """Commits of datasets, each of them a folder; the last one given is the main branch."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, Path]] = {}
        self.gone = False
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.address = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def push(self, name: str, folder: Path) -> str:
        """Make a folder the newest commit of a dataset."""
        history = self.commits.setdefault(name, {})
        sha = hashlib.sha1(f"{name} {len(history)}".encode()).hexdigest()
        history[sha] = folder
        return sha

    def close(self) -> None:
        self.gone = True  # for connections that are open, which a shutdown leaves alone
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str) -> Any:
        """JSON, a file, or the code of an error."""
        kind, *parts = unquote(path).strip("/").split("/")
        if kind == "api":
            kind, parts = parts[0], parts[1:]
        assert kind == "datasets", path
        name, (action, revision) = "/".join(parts[:2]), (parts[2:] or ["revision", "main"])[:2]
        history = self.commits.get(name)
        if history is None:
            return "RepoNotFound"
        sha = list(history)[-1] if revision == "main" else revision
        if sha not in history:
            return "RevisionNotFound"
        below = "/".join(parts[4:])
        if action == "revision":
            return {"id": name, "sha": sha}
        target = history[sha] / below
        if action == "resolve":
            return target if target.is_file() else "EntryNotFound"
        if not target.is_dir():
            return "EntryNotFound"
        return [_entry(history[sha], one) for one in sorted(target.rglob("*"))]


def _entry(root: Path, path: Path) -> dict[str, Any]:
    name = path.relative_to(root).as_posix()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": "0" * 40}
    data = path.read_bytes()
    return {
        "type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest(),
    }  # fmt: skip


def _handler(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            url = urlsplit(self.path)
            if hub.gone:
                self.close_connection = True
                return
            found = hub.answer(url.path)
            if isinstance(found, list) and "recursive=true" not in url.query.lower():
                depth = min((one["path"].count("/") for one in found), default=0)
                found = [one for one in found if one["path"].count("/") == depth]
            if isinstance(found, str):
                self.reply(404, b"{}", {"X-Error-Code": found})
            elif isinstance(found, Path):
                self.send_file(found.read_bytes())
            else:
                self.reply(200, json.dumps(found).encode())

        def send_file(self, data: bytes) -> None:
            asked = self.headers.get("Range")
            if asked is None:
                return self.reply(200, data)
            first, last = asked.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1]
            where = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            return self.reply(206, part, {"Content-Range": where})

        def reply(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler

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
        """JSON, a file of a commit, or the code of an error."""
        kind, *parts = unquote(path).removeprefix("/api").strip("/").split("/")
        if kind != "datasets":
            return "EntryNotFound"
        name, (action, revision) = "/".join(parts[:2]), (parts[2:] or ["revision", "main"])[:2]
        history = self.commits.get(name)
        if history is None:
            return "RepoNotFound"
        sha = list(history)[-1] if revision == "main" else revision
        if sha not in history:
            return "RevisionNotFound"
        return (
            {"id": name, "sha": sha}
            if action == "revision"
            else self._content(action, history[sha], "/".join(parts[4:]), sha)
        )

    def _content(self, action: str, root: Path, below: str, sha: str) -> Any:
        target = root / below
        if action == "resolve" and target.is_file():
            return target, sha
        if action == "tree" and target.is_dir():
            return [_entry(root, one) for one in sorted(target.rglob("*"))]
        return "EntryNotFound"


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
            elif isinstance(found, tuple):
                self.send_file(found[0].read_bytes(), found[1])
            else:
                self.reply(200, json.dumps(found).encode())

        do_HEAD = do_GET

        def send_file(self, data: bytes, commit: str) -> None:
            asked = self.headers.get("Range")
            if asked is None:
                etag = hashlib.sha1(data).hexdigest()
                return self.reply(200, data, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
            first, last = asked.removeprefix("bytes=").split("-")
            part = data[int(first) : int(last) + 1]
            where = f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}"
            return self.reply(206, part, {"Content-Range": where})

        def reply(self, code: int, body: bytes, headers: dict[str, str] | None = None) -> None:
            self.send_response(code)
            for name, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler

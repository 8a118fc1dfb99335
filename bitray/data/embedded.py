"""The embedded corpus: three domains made from the Python installation, with no files or network.

`code` is the standard library's own source, `prose` its documentation, `arithmetic` generated word
problems with worked answers. Code and prose come from different modules, so that no docstring is in
both. The same Python version gives the same documents in the same order.
"""

import ast
import hashlib
import importlib
import os
import re
import sysconfig
from collections.abc import Iterator
from inspect import cleandoc
from pathlib import Path
from typing import Literal

from bitray.data.word_problems import word_problems
from bitray.settings import UserError

Domain = Literal["code", "prose", "arithmetic"]
REVISION = 1
"""Raise it when the same interpreter is to give other documents: prepared data are made anew."""
DEFAULT_BYTES: dict[Domain, int] = {"code": 2_400_000, "prose": 1_200_000, "arithmetic": 700_000}
SHORTEST, LONGEST = 300, 6000
"""Characters of a document of code or prose, roughly."""

_NOT_READING = {
    "__pycache__", "dist-packages", "encodings", "ensurepip", "idlelib", "lib2to3", "lib-dynload",
    "pydoc_data", "site-packages", "test", "tests", "turtledemo",
}  # fmt: skip
"""Folders of the standard library that are tables, tests or other people's."""


def documents(domain: Domain, max_bytes: int | None = None) -> Iterator[str]:
    """Different documents of a domain, up to a number of bytes."""
    make = {"code": _code, "prose": _prose, "arithmetic": word_problems}[domain]
    left = DEFAULT_BYTES[domain] if max_bytes is None else max_bytes
    seen: set[str] = set()
    for text in make():
        if text in seen:
            continue
        left -= len(text.encode())
        if left < 0:
            return
        seen.add(text)
        yield text


def _code() -> Iterator[str]:
    for path in _modules(odd=False):
        yield from _cut(_source(path))


def _prose() -> Iterator[str]:
    for text in _topics():
        yield from _cut(_reflowed(text))
    for path in _modules(odd=True):
        described = [d for d in _docstrings(_source(path)) if len(d) > 120]
        yield from _cut("\n\n".join(map(_reflowed, described)))


def _modules(odd: bool) -> list[Path]:
    """Half of the standard library's modules, in an order that follows no name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found = {hashlib.sha256(name.encode()).hexdigest(): name for name in _names(root)}
    chosen = [root / name for key, name in sorted(found.items()) if int(key[-1], 16) % 2 == odd]
    if not chosen:
        raise UserError(
            f"this Python has no library sources in {root}: there is no embedded corpus"
        )
    return chosen


def _names(root: Path) -> Iterator[str]:
    for folder, below, files in os.walk(root):
        below[:] = [name for name in below if name not in _NOT_READING]
        for file in files:
            if file.endswith(".py") and not file.startswith(("_sysconfigdata", "config-")):
                yield Path(folder, file).relative_to(root).as_posix()


def _source(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace")


def _cut(text: str) -> Iterator[str]:
    """Documents of many sizes, cut between definitions if those are small, else at blank lines."""
    blocks: list[str] = []
    for block in re.split(r"\n{3,}", text.strip("\n")):
        blocks += [block] if len(block) <= LONGEST // 2 else block.split("\n\n")
    document, size = "", 0
    for block in blocks:
        if document and len(document) + len(block) > size:
            yield document + "\n"
            document = ""
        size = size if document else _size(block)
        document = f"{document}\n\n{block}" if document else block
    if document.strip():
        yield document + "\n"


def _size(start: str) -> int:
    """How long the document that starts so may become: log-uniform in SHORTEST..LONGEST.

    Documents of one size would pack badly: two of 0.45 rows leave a tenth of it empty.
    """
    place = int.from_bytes(hashlib.sha256(start.encode()).digest()[:4]) / 2**32
    return int(SHORTEST * (LONGEST / SHORTEST) ** place)


def _topics() -> Iterator[str]:
    """The language reference of `help()`. Some distributions leave it out."""
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ModuleNotFoundError:
        return
    for name in sorted(topics):
        yield topics[name]


def _docstrings(source: str) -> Iterator[str]:
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):  # templates and deliberately broken files
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield ast.get_docstring(node, clean=True) or ""


def _reflowed(text: str) -> str:
    """Paragraphs on one line each, without sessions, grammar, rules and markup."""
    paragraphs = []
    for paragraph in re.split(r"\n\s*\n", cleandoc(text)):
        lines = paragraph.split("\n")
        if ">>>" in paragraph or "::=" in paragraph or len(paragraph) < 40:
            continue
        indents = {len(line) - len(line.lstrip()) for line in lines}
        flowing = len(indents) == 1
        words = " ".join(line.strip() for line in lines) if flowing else paragraph
        paragraphs.append(_plain(words))
    return "\n\n".join(paragraphs)


def _plain(text: str) -> str:
    text = re.sub(r":[a-z:]+:`~?([^`]*)`", r"\1", text)
    text = re.sub(r"`{1,2}([^`]+)`{1,2}", r"\1", text)
    return re.sub(r"\*{1,2}([^\s*][^*]*)\*{1,2}", r"\1", text)

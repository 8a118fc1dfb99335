"""How shell commands start Ray: the words that `ray start` gets, and the environment it is in.

Knows quotes, comments, lines that go on, and commands within a word, as `bash -c "..."` has them.
Functions, loops and substitutions are read as if they were lines of the script.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

TOKEN = re.compile(
    r"""(?P<gap>\\\n|[ \t\r]+|\#[^\n]*)
    |(?P<word>(?:'[^']*'|"(?:\\.|[^"\\])*"|\\[^\n]|&>|[<>]+&?|[^\s;&|()'"\\<>])+)
    |(?P<end>[;&|()\n])""",
    re.VERBOSE | re.DOTALL,
)
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)=(.*)", re.DOTALL)
RAY = re.compile(r"(^|[/${])ray\}?$")


class Command(NamedTuple):
    """One command: the line that it begins on, its words, and the variables that it gets."""

    line: int
    words: Sequence[str]
    environment: Mapping[str, str]

    def option(self, name: str) -> str | None:
        """An option's value; Ray takes the last one."""
        found = None
        for word, following in pairwise([*self.words, ""]):
            if word == name:
                found = following
            elif word.startswith(f"{name}="):
                found = word.removeprefix(f"{name}=")
        return found


def ray_starts(text: str) -> Iterator[Command]:
    """The commands that start Ray, from the word after `start` on."""
    for line, words, environment in commands(text):
        for at, (word, following) in enumerate(pairwise(words)):
            if RAY.search(word) and following == "start":
                yield Command(line, words[at + 2 :], environment)


def commands(text: str, inherited: Mapping[str, str] | None = None) -> Iterator[Command]:
    """All commands of a script."""
    shell: dict[str, str] = {}
    exported = dict(inherited or {})
    for line, words in _statements(text):
        pairs = [match.groups() for match in map(ASSIGNMENT.fullmatch, words) if match]
        if words[0] == "export":
            shell.update(pairs)
            names = (word.partition("=")[0] for word in words[1:])
            exported.update((name, shell.get(name, "")) for name in names)
        elif words[0] == "unset":
            for name in words[1:]:
                exported.pop(name, None)
        elif len(pairs) == len(words):
            shell.update(pairs)
            exported.update((name, value) for name, value in pairs if name in exported)
        else:  # what stands before a command, or is given to `env`, is for that command alone
            environment = {**exported, **dict(pairs)}
            yield Command(line, words, environment)
            for word in words:
                if re.search(r"\s", word):
                    for inner in commands(word, environment):
                        yield inner._replace(line=line + inner.line - 1)


def _statements(text: str) -> Iterator[tuple[int, list[str]]]:
    words: list[str] = []
    line = 1
    for token in TOKEN.finditer(f"{text}\n"):
        if token["word"]:
            line = line if words else text.count("\n", 0, token.start()) + 1
            words.append(_unquoted(token["word"]))
        elif token["end"] and words:
            yield line, words
            words = []


def _unquoted(word: str) -> str:
    return re.sub(r"'([^']*)'|\\\n|\\(.)|\"", lambda m: m[1] or m[2] or "", word, flags=re.DOTALL)

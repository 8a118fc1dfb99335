"""Progress is a bar on a terminal, lines elsewhere; results pass through either way."""

import io
from dataclasses import dataclass

import pytest

from bitray.data.progress import reported


@dataclass(frozen=True)
class Piece:
    tokens: int


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


PIECES = [Piece(1000), Piece(2000), Piece(4000)]


def test_a_terminal_shows_a_bar_with_tokens_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    assert [*reported(iter(PIECES), 3)] == PIECES
    shown = terminal.getvalue()
    assert "prepare: 100%" in shown and "7,000 tokens, " in shown and " tokens/s" in shown


def test_elsewhere_the_last_line_says_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert [*reported(iter(PIECES), 3)] == PIECES
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith("prepare: 3/3 units, 7,000 tokens, ") and line.endswith(" 0 s left")

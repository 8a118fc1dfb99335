"""A process that Ray ends, or that is killed, has its last words said by another."""

import subprocess
import sys

import pytest

from bitray.pipeline.session import LAST_WORDS

INSIDE = """
import os, signal, sys
from bitray.pipeline.interrupt import end_at_once
from bitray.pipeline.session import last_words
with last_words():
    {}
"""


@pytest.mark.parametrize(
    ("end", "code", "said"),
    [
        ("os._exit(1)", 1, LAST_WORDS + "\n"),  # as Ray's own core does
        ("os.kill(os.getpid(), signal.SIGKILL)", -9, LAST_WORDS + "\n"),
        ("pass", 0, ""),
        ("sys.exit(2)", 2, ""),
        ("end_at_once()", 130, ""),  # the second Ctrl-C
    ],
)
def test_only_who_cannot_speak_is_spoken_for(end: str, code: int, said: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INSIDE.format(end)], capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, "", said)

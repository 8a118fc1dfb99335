"""Random words without meaning, to measure speed with: as many as one likes, without any files."""

import random
from collections.abc import Iterator

REVISION = 1
"""Raise it when a seed is to give other documents: prepared data are made anew."""
LETTERS = "abcdefghijklmnopqrstuvwxyz"
WORDS = 5000
"""Different words of a seed. The k-th is drawn in proportion to 1 / k (Zipf's law), so that there
is something to learn: which words there are, and how often."""
SHORTEST, LONGEST = 50, 1500
"""Words of a document."""


def documents(seed: int, max_bytes: int) -> Iterator[str]:
    """Documents of a seed, in all of so many bytes or one document less."""
    rng = random.Random(seed)
    words = ["".join(rng.choices(LETTERS, k=rng.randint(2, 9))) for _ in range(WORDS)]
    shares = [1 / rank for rank in range(1, WORDS + 1)]
    while True:
        text = " ".join(rng.choices(words, shares, k=rng.randint(SHORTEST, LONGEST)))
        max_bytes -= len(text)
        if max_bytes < 0:
            return
        yield text

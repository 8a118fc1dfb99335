"""ROUGE (Lin, 2004): words that a text shares with a reference, as F1, without stemming.

Words are runs of ASCII letters and digits in lower case, as in the package rouge-score.
"""

import re
from collections import Counter
from collections.abc import Sequence

Words = Sequence[str]


def rouge(text: str, reference: str) -> dict[str, float]:
    """`rouge1` and `rouge2`: n-grams in common; `rougeL`: the longest common subsequence."""
    said, right = (re.findall("[a-z0-9]+", each.lower()) for each in (text, reference))
    longest = _f1(_common_subsequence(said, right), len(said), len(right))
    return {"rouge1": _ngrams(said, right, 1), "rouge2": _ngrams(said, right, 2), "rougeL": longest}


def _ngrams(said: Words, right: Words, n: int) -> float:
    counts = [Counter(zip(*(words[k:] for k in range(n)), strict=False)) for words in (said, right)]
    return _f1((counts[0] & counts[1]).total(), counts[0].total(), counts[1].total())


def _f1(common: int, said: int, right: int) -> float:
    return 2 * common / (said + right) if common else 0.0


def _common_subsequence(a: Words, b: Words) -> int:
    """Length of the longest one, a row of the table at a time."""
    row = [0] * (len(b) + 1)
    for word in a:
        before = 0
        for k, other in enumerate(b, start=1):
            before, row[k] = row[k], before + 1 if word == other else max(row[k], row[k - 1])
    return row[-1]

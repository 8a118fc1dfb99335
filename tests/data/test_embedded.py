"""The embedded corpus is the same every time, right in its sums, and its domains do not overlap."""

import itertools
import os
import re
import subprocess
import sys

import pytest

from bitray.data import embedded, pack, train_tokenizer
from bitray.data.manifest import digest
from bitray.data.tokenizer import Encoder, backend_json
from bitray.data.word_problems import KINDS, word_problems

DOMAINS = ("code", "prose", "arithmetic")


@pytest.fixture(scope="module")
def corpus() -> dict[str, list[str]]:
    return {domain: list(embedded.documents(domain)) for domain in DOMAINS}


def test_another_process_makes_the_same_documents(corpus):
    """Neither set order nor the order of folders may show."""
    program = (
        "from bitray.data import embedded; from bitray.data.manifest import digest;"
        f"print(digest([list(embedded.documents(d)) for d in {DOMAINS}]))"
    )
    run = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "PYTHONHASHSEED": "7"},
    )
    assert run.stdout.strip() == digest([corpus[domain] for domain in DOMAINS])


@pytest.mark.parametrize("domain", DOMAINS)
def test_documents_are_many_different_and_of_many_sizes(corpus, domain):
    sizes = [len(document.encode()) for document in corpus[domain]]
    assert len(set(corpus[domain])) == len(sizes) >= 500
    assert 0.8 * embedded.DEFAULT_BYTES[domain] < sum(sizes) <= embedded.DEFAULT_BYTES[domain]
    assert min(sizes) < max(sizes) / 4


def test_no_sentence_is_in_both_code_and_prose(corpus):
    """A held-out docstring must not be trainable as code."""
    code = re.sub(r"\W+", " ", " ".join(corpus["code"]))
    prose = [re.sub(r"\W+", " ", p) for d in corpus["prose"] for p in d.split("\n\n")]
    long = [paragraph.strip() for paragraph in prose if len(paragraph) > 120]
    assert len(long) > 1000
    assert sum(paragraph in code for paragraph in long) < 0.01 * len(long)


def test_limits_count_bytes():
    few = list(embedded.documents("arithmetic", max_bytes=1000))
    assert 700 < sum(map(len, few)) <= 1000


def test_word_problems_are_right():
    """Every `a op b = c` of the working holds, and the last number of the working is the answer."""
    problems = list(itertools.islice(word_problems(), 2000))
    checked = 0
    for problem in problems:
        question, working, answer = re.fullmatch(
            r"Question: (.*)\nAnswer: (.*)\n#### (-?\d+)\n", problem
        ).groups()
        for left, right in re.findall(r"(\d+(?: [-+*/] \d+)+) = (\d+)", working):
            assert eval(left) == int(right), problem
            checked += 1
        assert re.findall(r"\d+", working)[-1] == answer or f"= {answer}" in working, problem
        assert question.endswith("?")
    assert checked > 2000
    assert len({re.sub(r"\d+|[A-Z]\w+", "_", p) for p in problems}) > 10 * len(KINDS)


def test_the_mix_packs_with_hardly_any_padding(corpus):
    tokenizer = train_tokenizer((t for domain in DOMAINS for t in corpus[domain][::4]), 2048)
    encoder = Encoder(backend_json(tokenizer), 0)
    encoded = [encoder.encode(corpus[domain]) for domain in DOMAINS]
    tokens = sum(len(ids) for documents in encoded for ids in documents)
    for length, bar in ((512, 0.02), (2048, 0.015)):
        rows = sum(1 for documents in encoded for _ in pack(documents, length))
        assert 1 - tokens / (rows * length) < bar

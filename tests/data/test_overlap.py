"""The report on near-duplicates agrees with comparing every pair, and says what it looked at."""

import itertools
import json
import random
from pathlib import Path

import pytest

from bitray.data import DataSettings, Manifest, train_tokenizer
from bitray.data.job import plan_job
from bitray.data.overlap import NAME, Overlap, overlap
from bitray.data.preparation import run_job
from bitray.data.settings import HeldOut, OverlapSettings
from bitray.data.units import in_process, split_of

WORDS = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "en", "ist", "or")]
TOKENIZER = train_tokenizer([" ".join(WORDS)] * 3, 300)
HELD_OUT = HeldOut(probe=0.15, validation=0.15)


def changed(text: str, draw: random.Random, share: float) -> str:
    words = text.split()
    for at in range(len(words)):
        if draw.random() < share:
            words[at] = draw.choice(WORDS)
    return " ".join(words)


@pytest.fixture(scope="module")
def texts() -> dict[str, list[str]]:
    """Own texts of two sources; some of the first are in both, a little or very much changed."""
    draw = random.Random(0)
    own = [" ".join(draw.choices(WORDS, k=draw.randint(40, 90))) for _ in range(240)]
    near = [changed(text, draw, share) for text in own[:60] for share in (0.01, 0.05)]
    return {"first": own[:150] + own[:5], "second": own[150:] + near}


def prepared(root: Path, texts: dict[str, list[str]]) -> Manifest:
    for name, some in texts.items():
        (root / name).mkdir(parents=True)
        lines = "".join(json.dumps({"text": text}) + "\n" for text in some)
        (root / name / "a.jsonl").write_text(lines)
    sources = {name: {"path": str(root / name)} for name in texts}
    settings = DataSettings(sources=sources, split=HELD_OUT)
    return run_job(plan_job(settings, TOKENIZER, 1024, str(root / "out")), in_process)


def grams(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[at : at + 5]) for at in range(len(words) - 4)}


def test_it_finds_what_comparing_all_pairs_finds(tmp_path, texts):
    """MinHash may miss a pair at the threshold, but none that is well above, nor invent one."""
    manifest = prepared(tmp_path, texts)
    found = overlap(str(tmp_path / "out"), manifest, OverlapSettings(threshold=0.6))
    documents = [(name, split_of(text, HELD_OUT), grams(text))
                 for name, some in texts.items() for text in some]  # fmt: skip
    pairs = [
        (a, b, len(x[2] & y[2]) / len(x[2] | y[2]))
        for (a, x), (b, y) in itertools.permutations(enumerate(documents), 2)
    ]

    def number(place: tuple[str, str], others: list[tuple[str, str]], threshold: float) -> int:
        return len(
            {
                a
                for a, b, similarity in pairs
                if similarity >= threshold
                and documents[a][:2] == place
                and documents[b][:2] in others
            }
        )

    trained = [(name, "train") for name in texts]
    total = 0
    for name, other in itertools.product(texts, texts):
        mine = sum(d[:2] == (name, "train") for d in documents)
        hits = round(found.near_duplicates[name][other] * mine)
        most = number((name, "train"), [(other, "train")], 0.6)
        assert number((name, "train"), [(other, "train")], 0.7) <= hits <= most
        total += hits
    assert total > 60
    for name, split in itertools.product(texts, ("probe", "validation")):
        held = found.compared[name][split]
        assert held.documents == sum(d[:2] == (name, split) for d in documents)
        most = number((name, split), trained, 0.6)
        assert number((name, split), trained, 0.7) <= held.leaked <= most
        assert held.leaked > 0


def test_it_is_kept_shown_and_the_same_again(tmp_path, texts):
    manifest = prepared(tmp_path, texts)
    root = str(tmp_path / "out")
    found = overlap(root, manifest, OverlapSettings())
    kept = (tmp_path / "out" / NAME).read_bytes()
    assert Overlap.model_validate_json(kept) == found
    (tmp_path / "out" / NAME).unlink()
    overlap(root, manifest, OverlapSettings())
    assert (tmp_path / "out" / NAME).read_bytes() == kept
    shown = found.text()
    assert "first" in shown and "near-duplicates: 5-grams of words, similarity >= 0.7" in shown
    one = found.examples[0]
    assert one.texts[0] in shown and 0.7 <= one.similarity <= 1
    assert all("train" in " ".join(one.places) for one in found.examples)


def test_a_sample_says_so(tmp_path, texts):
    manifest = prepared(tmp_path, texts)
    found = overlap(str(tmp_path / "out"), manifest, OverlapSettings(max_documents=30))
    train = found.compared["second"]["train"]
    assert train.rows < train.of_rows == manifest.num_rows("second")
    assert 5 <= train.documents <= 60
    assert f"compared with {train.rows} of {train.of_rows} training rows of it (a sample" in (
        found.text()
    )

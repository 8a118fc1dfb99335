"""Synthetic text: the same for a seed, as much as was asked for, with something to learn in it."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from bitray import Config
from bitray.data import synthetic
from bitray.data.sources import SyntheticSource


@settings(max_examples=20)
@given(st.integers(0, 2**32), st.integers(1, 200_000))
def test_a_seed_gives_the_same_documents_up_to_a_size(seed: int, size: int) -> None:
    found = list(synthetic.documents(seed, size))
    assert found == list(synthetic.documents(seed, size))
    assert size - 10 * synthetic.LONGEST < sum(map(len, found)) <= size
    longer = synthetic.documents(seed, 2 * size)
    assert found == [text for text, _ in zip(longer, found, strict=False)]


def test_frequent_words_are_as_frequent_as_zipf_says() -> None:
    counts = Counter(" ".join(synthetic.documents(3, 2_000_000)).split()).most_common()
    shares = [n for _, n in counts]
    assert 8 < shares[0] / shares[9] < 12 and len(counts) <= synthetic.WORDS


def test_a_source_reads_it_and_another_seed_is_another_text() -> None:
    one, two = (SyntheticSource(seed=seed, max_bytes=50_000) for seed in (1, 2))
    [unit] = one.units("one", one.inputs(), 1 << 20)
    texts = [found.text for found in one.read(unit.parts[0])]
    assert texts == list(synthetic.documents(1, 50_000))
    assert one.inputs() != two.inputs() != SyntheticSource(seed=2, max_bytes=60_000).inputs()


def test_the_preset_may_be_remixed() -> None:
    config = Config.load(overrides=["data=synthetic", "training.influence.enabled=true"])
    assert len(config.data.remixed()) == 2

"""Near-duplicates among prepared documents, and held-out ones that training has seen: a report.

Documents are as rows hold them: those longer than a row are several. They are compared by the
Jaccard similarity of their n-grams of words; MinHash proposes pairs, each of which is then checked.
"""

import re
import zlib
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt32
from tokenizers import Tokenizer

from bitray import storage
from bitray.data.manifest import SPLITS, Manifest, SplitName
from bitray.data.settings import OverlapSettings
from bitray.data.shards import Shards
from bitray.settings import Settings

NAME = "overlap.json"
_PERMUTATIONS = 128
_SHOWN = 120
"""Characters of an example."""
_WORD = re.compile(r"\w+")


class Compared(Settings):
    """How much of one split of a source was looked at."""

    documents: int
    rows: int
    of_rows: int
    leaked: int = 0
    """Of held-out ones: those with a near-duplicate in the training rows that were looked at."""


class Example(Settings):
    """Two documents that are nearly the same."""

    places: tuple[str, str]
    similarity: float
    texts: tuple[str, str]


class Overlap(Settings):
    """What was found."""

    settings: OverlapSettings
    compared: dict[str, dict[SplitName, Compared]]
    near_duplicates: dict[str, dict[str, float]]
    """Share of the training documents of a source that have one in another, or twice in its own."""
    examples: tuple[Example, ...]

    def text(self) -> str:
        """Tables for people."""
        names = list(self.near_duplicates)
        wide = max(map(len, names)) + 2
        lines = [
            f"near-duplicates: {self.settings.ngram}-grams of words, similarity >= "
            f"{self.settings.threshold:g}; share of a line's training documents, by source:",
            " " * wide + "".join(f"{name:>{max(wide, 9)}}" for name in names),
        ]
        for name in names:
            shares = (self.near_duplicates[name][other] for other in names)
            lines.append(f"{name:<{wide}}" + "".join(f"{s:>{max(wide, 9)}.2%}" for s in shares))
        lines += ["held-out documents with a near-duplicate in training rows:"]
        for name, splits in self.compared.items():
            held = ", ".join(f"{splits[s].leaked} of {splits[s].documents} {s}" for s in SPLITS[1:])
            train = splits["train"]
            sampled = "" if train.rows == train.of_rows else " (a sample: a lower bound)"
            lines.append(
                f"{name:<{wide}}{held}; compared with {train.rows:,} of {train.of_rows:,} "
                f"training rows of it{sampled}"
            )
        for one in self.examples:
            lines.append(f"{one.similarity:.2f}  {one.places[0]}: {one.texts[0]!r}")
            lines.append(f"      {one.places[1]}: {one.texts[1]!r}")
        return "\n".join(lines)


def overlap(root_uri: str, manifest: Manifest, settings: OverlapSettings) -> Overlap:
    """Compare the documents of a prepared folder; the result is kept in it as `overlap.json`."""
    uri = storage.join(root_uri, NAME)
    if storage.exists(uri):
        kept = Overlap.model_validate(storage.read_json(uri))
        if kept.settings == settings:
            return kept
    documents, compared = _documents(root_uri, manifest, settings)
    groups = _Groups(documents, settings.threshold)
    names = list(manifest.sources)
    for name in names:
        for split in SPLITS[1:]:
            leaked = groups.number((name, split), [(other, "train") for other in names])
            found = compared[name][split].model_copy(update={"leaked": leaked})
            compared[name][split] = found
    shares = {
        name: {
            other: groups.number((name, "train"), [(other, "train")])
            / max(1, compared[name]["train"].documents)
            for other in names
        }
        for name in names
    }
    result = Overlap(
        settings=settings,
        compared=compared,
        near_duplicates=shares,
        examples=tuple(groups.examples(settings.examples)),
    )
    storage.write_json(uri, result.model_dump(mode="json"))
    return result


Place = tuple[str, str]
"""Source and split."""


class _Document(NamedTuple):
    place: Place
    beginning: str
    ngrams: UInt32[np.ndarray, " n"]
    """Hashes, sorted, each once."""


def _documents(
    root_uri: str, manifest: Manifest, settings: OverlapSettings
) -> tuple[list[_Document], dict[str, dict[SplitName, Compared]]]:
    """The documents to compare, and how many they are of each source and split."""
    shards = Shards(root_uri, manifest)
    tokenizer = Tokenizer.from_str(storage.read_text(storage.join(root_uri, "tokenizer.json")))
    documents: list[_Document] = []
    compared: dict[str, dict[SplitName, Compared]] = {}
    for name, source in manifest.sources.items():
        compared[name] = {}
        for split, counts in source.splits.items():
            take = counts.rows
            if counts.documents > settings.max_documents:
                take = max(1, counts.rows * settings.max_documents // counts.documents)
            before = len(documents)
            for text in _texts(shards, tokenizer, name, split, take):
                ngrams = _ngrams(text, settings.ngram)
                if len(ngrams):
                    documents.append(_Document((name, split), text[:_SHOWN], ngrams))
            compared[name][split] = Compared(
                documents=len(documents) - before, rows=take, of_rows=counts.rows
            )
    return documents, compared


def _texts(
    shards: Shards, tokenizer: Tokenizer, source: str, split: SplitName, take: int
) -> Iterator[str]:
    """Documents of so many evenly spread rows."""
    numbers = np.arange(take) * shards.num_rows(source, split) // max(1, take)
    for some in np.array_split(numbers, -(-take // 256) or 1):
        found = shards.read(source, split, some)
        pieces = [
            ids.tolist()
            for row, lengths in zip(found.input_ids, found.lengths, strict=True)
            for ids in np.split(row, np.cumsum(lengths))[:-1]
        ]
        yield from tokenizer.decode_batch(pieces)


def _ngrams(text: str, size: int) -> UInt32[np.ndarray, " n"]:
    words = _WORD.findall(text.lower())
    count = max(len(words) - size + 1, min(1, len(words)))
    hashes = [zlib.crc32(" ".join(words[at : at + size]).encode()) for at in range(count)]
    return np.unique(np.array(hashes, np.uint32))


class _Groups:
    """Documents with the same n-grams are one group; groups that are near each other know it."""

    def __init__(self, documents: list[_Document], threshold: float) -> None:
        by_content: dict[bytes, list[_Document]] = {}
        for document in documents:
            by_content.setdefault(document.ngrams.tobytes(), []).append(document)
        self._groups = list(by_content.values())
        self._near: list[dict[int, float]] = [{k: 1.0} for k in range(len(self._groups))]
        for a, b in self._candidates(threshold):
            similarity = _jaccard(self._groups[a][0].ngrams, self._groups[b][0].ngrams)
            if similarity >= threshold:
                self._near[a][b] = self._near[b][a] = similarity

    def number(self, place: Place, others: list[Place]) -> int:
        """How many documents of one place have a near-duplicate in any of the others."""
        total = 0
        for group, near in zip(self._groups, self._near, strict=True):
            mine = sum(document.place == place for document in group)
            if mine:
                around = Counter(one.place for k in near for one in self._groups[k])
                around[place] -= 1  # itself
                total += mine * any(around[other] > 0 for other in others)
        return total

    def examples(self, count: int) -> Iterator[Example]:
        """The first pairs of every two places of which at least one is of training."""
        seen: Counter[tuple[Place, Place]] = Counter()
        for a, near in enumerate(self._near):
            for b, similarity in sorted(near.items()):
                one, other = self._groups[a][0], self._groups[b][-1]
                pair = (min(one.place, other.place), max(one.place, other.place))
                trained = "train" in (one.place[1], other.place[1])
                if b < a or one is other or not trained or seen[pair] == count:
                    continue
                seen[pair] += 1
                yield Example(
                    places=(" ".join(one.place), " ".join(other.place)),
                    similarity=similarity,
                    texts=(one.beginning, other.beginning),
                )

    def _candidates(self, threshold: float) -> Iterator[tuple[int, int]]:
        """Pairs of groups that MinHash believes to be near, each once, in order."""
        from datasketch import MinHash, MinHashLSH

        # Rather a pair too many, which is then checked, than one that is missed.
        index = MinHashLSH(threshold=threshold, num_perm=_PERMUTATIONS, weights=(0.1, 0.9))
        for number, group in enumerate(self._groups):
            sketch = MinHash(num_perm=_PERMUTATIONS, seed=1, hashfunc=int)
            sketch.update_batch(group[0].ngrams.tolist())
            for other in sorted(index.query(sketch)):
                yield other, number
            index.insert(number, sketch)


def _jaccard(a: UInt32[np.ndarray, " n"], b: UInt32[np.ndarray, " m"]) -> float:
    common = len(np.intersect1d(a, b, assume_unique=True))
    return common / (len(a) + len(b) - common)

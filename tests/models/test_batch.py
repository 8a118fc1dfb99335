"""What of a row is learnt: not padding, not prompts, not the first token of a document."""

import numpy as np

from bitray.data.packing import PackedRows
from bitray.models.batch import IGNORED, Batch


def test_labels_of_prompts_and_first_tokens_are_masked() -> None:
    rows = PackedRows(
        np.arange(1, 21, dtype=np.int32).reshape(2, 10), [[4, 3], [10]], [[2, 0], [1]]
    )
    batch = rows.batch([5, 6])
    x = IGNORED
    assert batch.labels.tolist() == [[x, x, 3, 4, x, 6, 7, x, x, x], [x, *range(12, 21)]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2], list(range(10))]
    assert batch.source_id.tolist() == [5, 6]
    assert batch.real.sum(1).tolist() == [7, 10]


def test_without_prompts_only_first_tokens_are_masked() -> None:
    ids, lengths = np.ones((1, 6), np.int32), [[3, 2]]
    assert Batch.from_rows(ids, lengths, [0]).labels.tolist() == [[-100, 1, 1, -100, 1, -100]]


def test_a_part_keeps_what_belongs_together() -> None:
    rows = PackedRows(np.arange(12, dtype=np.int32).reshape(3, 4), [[4], [3], [2]], [[1], [0], [1]])
    part = rows.part(1, 3)
    assert part.input_ids.tolist() == [[4, 5, 6, 7], [8, 9, 10, 11]]
    assert (part.lengths, part.prompts) == ([[3], [2]], [[0], [1]])

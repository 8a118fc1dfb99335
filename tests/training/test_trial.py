"""Micro-batches by trial: which are tried, in which steps, what a process of their own takes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_loop import CONFIG, settings

from bitray.models.loading import build_model
from bitray.training.teacher_settings import Actors, InProcess
from bitray.training.trial import Trial, candidates, largest, memory, peak, telling_steps


@given(st.integers(1, 200), st.integers(1, 9))
def test_candidates_cut_the_global_batch_evenly_and_leave_nobody_idle(rows, workers):
    found = candidates(rows, workers)
    assert found[0] == 1 and found == sorted(found)
    for size in range(1, rows + 1):
        enough = rows // size >= workers or size == 1
        assert (size in found) == (rows % size == 0 and enough)


@given(st.lists(st.integers(1, 99), unique=True, min_size=1).map(sorted), st.integers(0, 100))
def test_the_largest_that_fits_is_found_in_few_trials(sizes, limit):
    tried = []

    def fits(size):
        tried.append(size)
        return size <= limit

    expected = max((size for size in sizes if size <= limit), default=None)
    assert largest(sizes, fits) == expected
    assert len(tried) <= math.ceil(math.log2(len(sizes) + 1))


def test_steps_are_tried_for_all_objectives_and_kernels():
    given = settings(max_steps=100, lambda_warmup={"warmup_steps": 30})
    assert {given.strength(step, 0.0) < 1 for step in telling_steps(given)} == {True, False}
    phases = [{"until": 0.5, "weights": {"logits_distill": 0}}, {"until": 1.0}]
    given = settings(
        max_steps=100, lambda_warmup={"warmup_steps": 0}, objectives={"logits_distill": {}},
        curriculum={"phases": phases},
    )  # fmt: skip
    assert [set(given.weights(step)) for step in sorted(telling_steps(given))] == [
        {"continue_pretrain"}, {"continue_pretrain", "logits_distill"},
    ]  # fmt: skip


def trial(**changes: object) -> Trial:
    config = build_model(CONFIG | {"max_position_embeddings": 512}).config.to_json_string(False)
    given = settings(
        batch_size=64, gradient_accumulation_steps=2, max_seq_length=512, logits_chunk=64,
        objectives={"logits_distill": {}}, saliency_curriculum={"enabled": True},
    )  # fmt: skip
    values = {"settings": given, "model": config, "teacher": InProcess(),
              "teacher_model": config, "subln": "paper",
              "device": "cpu", "rank": 1, "world": 2}  # fmt: skip
    return Trial(**values | changes)  # type: ignore[arg-type]


@pytest.mark.slow
def test_what_a_micro_batch_takes_is_measured_apart_and_more_than_the_limit_is_stopped():
    """64 rows of 512 tokens of 32 floats: every activation kept takes 4 MB. The process that asks
    has been larger itself."""
    torch.ones(300_000_000).sum()
    alone = trial(rank=0, world=1)
    small, large = peak(trial(), 1, math.inf), peak(alone, 64, math.inf)
    assert small > 50e6 and small + 100e6 < large
    assert peak(alone, 64, (small + large) / 2) == math.inf
    masks = settings(max_seq_length=64, objectives={"dlm": {"weight": 1.0}}, lrc={})
    assert peak(trial(settings=masks), 1, math.inf) < large, "block diffusion of corrections"
    told = settings(max_seq_length=64, objectives={"dlm": {"weight": 1.0}, "tcs_distill": {}})
    far = peak(trial(settings=told, teacher=Actors(top_k=100)), 1, math.inf)
    assert far < large, "a teacher that is far away, and never asked about logits_distill"
    with pytest.raises(RuntimeError, match="model_type"):
        peak(trial(model="{}"), 1, math.inf)


def test_a_worker_has_its_share_of_the_machine():
    assert 0 < memory("cpu", 4) < memory("cpu", 1) < 1e14

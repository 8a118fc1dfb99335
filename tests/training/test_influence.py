"""Influence in the loop: no trace of measuring, alike on any number of workers, resumed alike."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch

from bitray.data.mixture import Mixture, StageMixture
from bitray.data.reader import SyntheticShards, empty_batch, read_rows
from bitray.data.tickets import EMPTY, Deal
from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.models.losses import LossModel
from bitray.training import state
from bitray.training.gradients import gram_matrix, watched_parameters
from bitray.training.influence import Influence, Material
from bitray.training.loop import Every, Loop, autocast_for
from bitray.training.parallel import parallelize, world
from bitray.training.settings import InfluenceSettings, Resume, TrainingSettings

CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
CPU = torch.device("cpu")
EXACT = autocast_for(CPU, "fp32")
LENGTH, STEPS, SOURCES = 24, 14, {"a": 60, "b": 60, "c": 60}
SHARDS = SyntheticShards(SOURCES, LENGTH, 61)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


Phases = tuple[tuple[int, dict[str, float]], ...]


class Run:
    """A loop over a mixture, with influence."""

    phases: Phases = ()
    first: int | None = 4
    period: int | None = 4

    def __init__(self, method: str = "cosine", seed: int = 0, **influence: Any) -> None:
        self.settings = TrainingSettings.model_validate(
            {
                "max_steps": STEPS, "batch_size": 3, "gradient_accumulation_steps": 3,
                "max_seq_length": LENGTH, "log_every": 2, "optimizer": {"lr": 1e-4},
                "lambda_warmup": {"enabled": False},
                "influence": {
                    "enabled": True, "method": method, "warmup_steps": 4, "update_interval": 4,
                    "budget": 99, "probe_rows": 5, "groups": 3, "group_rows": 2, **influence,
                },
            }
        )  # fmt: skip
        torch.manual_seed(seed)
        model = LossModel(to_bitnet(build_model(CONFIG), "paper"))
        parallelize(model, self.settings, CPU)
        optimizer = self.settings.optimizer.build(model)
        self.metrics: list[dict[str, float]] = []
        self.loop = Loop(
            "here", model, optimizer, self.settings, CPU, EXACT, sources=tuple(SOURCES),
            sinks=[self],
        )  # fmt: skip
        given = self.settings.influence
        self.hook = Influence(
            given, 4, Material({"a": rows("a", range(5))}, groups(given)),
            dict.fromkeys(SOURCES, 1 / 3), self.decided,
        )  # fmt: skip
        self.loop.hooks = [Every(1, self.hook)]
        self.mixture = self.opened(None)
        self.notes: list[Mapping[str, Any]] = []

    def opened(self, held: dict[str, Any] | None) -> Mixture:
        stage = StageMixture(
            seed=0, manifest="m", sizes=SHARDS.sizes, length=LENGTH,
            weights=dict.fromkeys(SOURCES, 1.0), steps=STEPS, rows_per_ticket=3,
            tickets_per_step=3, bundle=1, lead=4, max_workers=4, period=self.period,
            first_decision=self.first,
            bounds=(0.05, 0.60), phases=self.phases,
        )  # fmt: skip
        return Mixture.opened(stage, 1, held)

    def decided(self, step: int, weights: Any, notes: Mapping[str, Any]) -> None:
        self.mixture.decide(step, weights, notes)
        self.notes.append(notes)

    def tickets(self) -> Iterator[tuple[int, Batch]]:
        deal, step = Deal(3, world()[1]), self.loop.data_step
        while True:
            for ticket in deal.step(world()[0], step):
                yield ticket, self.batch(ticket)
            step += 1

    def batch(self, ticket: int) -> Batch:
        if ticket == EMPTY:
            return empty_batch(3, LENGTH)
        found = self.mixture.plan.rows(ticket * 3, 3)
        return read_rows(SHARDS, tuple(SOURCES), found).batch(found.source.tolist())

    def train(self, until: int = STEPS) -> "Run":
        def stop(loop: Loop) -> None:
            loop.stopped = loop.position.step >= until

        self.loop.hooks = [*self.loop.hooks, Every(1, stop)]
        self.loop.run(self.tickets())
        return self

    # a sink
    def write(self, stage: str, step: int, metrics: Mapping[str, float]) -> None:
        self.metrics.append(dict(metrics))

    def flush(self) -> None: ...
    def close(self) -> None: ...


def rows(source: str, numbers: Any) -> Batch:
    return SHARDS.read(source, "train", list(numbers)).batch()


def groups(given: InfluenceSettings) -> Any:
    def of(source: str, number: int) -> list[Batch]:
        first = 10 + number * given.groups * given.group_rows
        at = [range(first + k * given.group_rows, first + (k + 1) * given.group_rows)
              for k in range(given.groups)]  # fmt: skip
        return [rows(source, part) for part in at]

    return of


# ------------------------------------------------------------------------------------- one worker


def test_the_gram_matrix_is_that_of_plain_gradients() -> None:
    run = Run()
    batches = [rows("a", range(5)), rows("b", range(4)), rows("c", range(1, 3))]
    gram = gram_matrix(run.loop, batches, depth=2 / 3)
    model = run.loop.model.model
    watched = [p for layer in model.model.layers[1:] for p in layer.parameters() if p.ndim == 2]
    assert {id(p) for part in watched_parameters(run.loop.model, 2 / 3)[:-1] for p in part} == {
        id(p) for p in watched
    }
    found = []
    for batch in batches:
        out = model(batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            out[:, :-1].flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=-100
        )
        grads = torch.autograd.grad(loss, [*watched, model.model.norm.weight])
        found.append(torch.cat([g.flatten() for g in grads]).double().numpy())
    np.testing.assert_allclose(gram.sum(0), np.array(found) @ np.array(found).T, rtol=2e-4)


def test_an_update_leaves_no_trace() -> None:
    """Parameters, optimizer, random generator, strength, step and rows: bit for bit."""
    run = Run()
    run.train(until=3)
    before = snapshot(run)
    run.loop.data_step = 4  # a step of decision
    run.hook(run.loop)
    run.loop.data_step = 3
    assert len(run.notes) == 1 and before == snapshot(run)


def snapshot(run: Run) -> list[Any]:
    loop = run.loop
    tensors = [*loop.model.state_dict().values(), torch.get_rng_state(), loop.source_sums]
    for moments in loop.optimizer.state.values():
        tensors += list(moments.values())
    modes = [m.training for m in loop.model.modules()]
    assert all(p.grad is None for p in loop.model.parameters())
    return [*(t.numpy().tobytes() for t in tensors), repr(loop.position), loop.data_step, modes]


def test_training_is_the_same_with_decisions_that_change_nothing() -> None:
    """The whole run, with influence on and its decisions thrown away, against one without."""
    watched = Run()
    watched.hook.on_decision = lambda step, weights, notes: watched.decided(step, None, notes)
    watched.train()
    plain = Run("ado")  # takes no gradients
    plain.hook.on_decision = lambda step, weights, notes: plain.decided(step, None, notes)
    plain.train()
    assert len(watched.notes) == len(plain.notes) == 3
    for name, value in plain.loop.model.state_dict().items():
        assert torch.equal(value, watched.loop.model.state_dict()[name]), name


@pytest.mark.parametrize("method", [
    "cosine", "ado", *(pytest.param(each, marks=pytest.mark.slow) for each in ("datainf", "dot")),
])  # fmt: skip
def test_a_resumed_run_decides_alike(method: str, tmp_path: Path) -> None:
    """Stopped in mid-interval, at a decision, and before the first one."""
    whole = Run(method).train()
    for stop in (2, 7, 8):
        half = Run(method).train(until=stop)
        directory = str(tmp_path / f"{stop}")
        held = state.as_json(half.loop.position, half.mixture.state(stop))
        held["influence"] = json.loads(json.dumps(half.hook.state(half.loop)))
        state.save(directory, half.loop.model, half.loop.optimizer, held, {})
        rest = Run(method, seed=5)
        loop = rest.loop
        loop.position, data = state.resume(directory, loop.model, loop.optimizer, Resume())
        assert data is not None
        loop.data_step, rest.mixture = data["step"], rest.opened(data)
        rest.hook.resume(loop, held["influence"])
        rest.train()
        assert [entry.weights for entry in rest.mixture.plan.journal] == [
            entry.weights for entry in whole.mixture.plan.journal
        ]
        for name, value in whole.loop.model.state_dict().items():
            assert torch.equal(value, loop.model.state_dict()[name]), (stop, name)


def test_decisions_are_logged_and_noted() -> None:
    run = Run(learning_rate=0.5).train()
    entries = run.mixture.plan.journal[1:]
    assert [entry.step for entry in entries] == [4, 8, 12]
    last = run.notes[-1]
    assert set(last["scores"]["a"]) == set(last["errors"]["a"]) == set(last["standing"])
    found = [m for m in run.metrics if "influence/weight_a" in m]
    assert len(found) == 3 and 0 < found[-1]["influence/overhead"] < 1
    for source, weight in zip(SOURCES, entries[-1].weights, strict=True):
        assert found[-1][f"influence/weight_{source}"] == weight / 4096
        assert found[-1][f"influence/score_a_{source}"] == last["scores"]["a"][source]
        assert f"influence/datainf_a_{source}" in found[-1]
    assert sum(entries[-1].weights) == 4096
    assert all(0.05 * 4096 <= w <= 0.6 * 4096 for w in entries[-1].weights)


def test_it_goes_on_from_the_weights_that_a_phase_has_set() -> None:
    """A phase begins with step 11: 4 steps ahead, that is between the decisions of 4 and 8."""

    class Curriculum(Run):
        phases = ((11, {"a": 0.2, "b": 0.5, "c": 0.3}),)

    run = Curriculum(learning_rate=0.01)
    run.hook.current = lambda step: {
        name: w / 4096
        for name, w in zip(SOURCES, run.mixture.plan.journal[-1].weights, strict=True)
    }
    run.train(until=9)
    found = {e.step: np.array(e.weights) / 4096 for e in run.mixture.plan.journal}
    assert list(found) == [-1, 4, 7, 8]
    assert np.abs(found[4] - 1 / 3).max() < 0.01
    assert found[7] == pytest.approx([0.2, 0.5, 0.3], abs=1e-3)
    assert 0 < np.abs(found[8] - found[7]).max() < 0.01


def test_influence_that_is_turned_on_or_timed_anew_on_resume_goes_on() -> None:
    """A checkpoint of step 5 without influence, and of step 7 with decisions at 4, 8, 12: from
    there on those of 2, 5, 8, 11, 14, as the hook and the holder of the journal have to agree."""
    off = Run()
    off.loop.hooks, off.first, off.period = [], None, None
    off.mixture = off.opened(None)
    for run in (off.train(until=5), Run().train(until=7)):
        state = json.loads(json.dumps(run.mixture.state(run.loop.data_step)))
        on = Run(warmup_steps=2)
        on.hook.interval, on.first, on.period = 3, 2, 3
        on.mixture = on.opened(state)
        on.loop.position.step = on.loop.data_step = state["step"]
        on.train()
        before = [entry.step for entry in run.mixture.plan.journal]
        assert [e.step for e in on.mixture.plan.journal] == [*before, 8, 11, 14]


def test_a_decision_that_changes_nothing_notes_the_running_mean_too() -> None:
    run = Run().train(until=7)
    mean = dict(run.hook.score or {})
    with torch.no_grad():
        run.loop.model.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    run.loop.data_step = 8
    run.hook(run.loop)
    assert mean and run.notes[-1]["standing"] == mean and "kept" in run.notes[-1]


def test_losses_by_source_add_up_to_the_loss() -> None:
    run = Run().train()
    for found in (m for m in run.metrics if "train/loss" in m):
        parts = [found[f"mixture/loss_{s}"] for s in SOURCES if f"mixture/loss_{s}" in found]
        assert min(parts) <= found["train/continue_pretrain_loss"] <= max(parts)
    tokens, nll, labels = run.loop.source_sums.sum(1).tolist()
    assert tokens == run.loop.position.tokens and labels < tokens and nll > 0


def test_gradients_that_are_not_finite_keep_the_weights(capsys: pytest.CaptureFixture) -> None:
    run = Run()
    run.train(until=3)
    with torch.no_grad():
        run.loop.model.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
    run.loop.data_step = 4
    run.hook(run.loop)
    assert run.mixture.plan.journal[-1].version == 0 and "not finite" in run.notes[0]["kept"]
    assert "weights stay as they are, a gradient was not finite" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- many workers


def everything() -> dict[str, Any]:
    batches = [rows("a", range(5)), rows("b", range(4)), rows("c", range(1, 3))]
    found: dict[str, Any] = {"gram": gram_matrix(Run().loop, batches, 1.0)}
    for method in ("cosine", "ado"):
        run = Run(method).train()
        found[method] = [entry.weights for entry in run.mixture.plan.journal]
    return found


@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_any_number_of_workers_finds_the_same(size: int, tmp_path: Path) -> None:
    """Inner products to rounding, decisions exactly, on every worker."""
    workers, one = ranks.run(everything, tmp_path, size=size), everything()
    assert len(set(one["cosine"])) > 1, "nothing was decided"
    for found in workers:
        np.testing.assert_allclose(found["gram"], one["gram"], rtol=1e-4, atol=1e-7)
        for method in ("cosine", "ado"):
            assert found[method] == one[method]

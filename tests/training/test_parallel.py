"""The loop on two FSDP2 workers (gloo, no Ray) does what one worker does with the same batches."""

import errno
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ranks
import torch
from keep import Keep

from bitray.data.tickets import EMPTY, Deal
from bitray.inference.evaluation import evaluate
from bitray.models.batch import Batch
from bitray.models.convert import to_bitnet
from bitray.models.families import decoder_layers
from bitray.models.loading import build_model
from bitray.models.losses import LossModel
from bitray.nn import bit_linears
from bitray.pipeline.evaluations import HeldOut
from bitray.settings import UserError
from bitray.training import state
from bitray.training.goodput import Clock
from bitray.training.loop import Every, Loop, autocast_for
from bitray.training.metrics import JsonLines
from bitray.training.parallel import on_rank_zero, parallelize, world
from bitray.training.settings import Resume, TrainingSettings
from bitray.training.teacher import InProcessTeacher

CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
CPU = torch.device("cpu")
ROWS_PER_STEP = 12
DENSE, BLENDED, TERNARY = "dense", "blended", "ternary"
OBJECTIVES = {
    "continue_pretrain": {"weight": 0.5}, "logits_distill": {"weight": 0.5},
    "hidden_distill": {"weight": 1.0}, "attention_distill": {"weight": 1.0},
}  # fmt: skip


def row(number: int) -> tuple[np.ndarray, list[int]]:
    """A row of documents that can be learnt, of very different length: workers get unequal work."""
    draw = np.random.default_rng(number)
    ids = (draw.integers(0, 61) * 7 + np.arange(24) * draw.integers(1, 4)) % 61
    return ids.astype(np.int32), [[24], [10, 12], [3], [5, 5, 9]][number % 4]


def tickets(deal: Deal, rows: int, start: int = 0) -> Iterator[tuple[int, Batch]]:
    """This worker's micro-batches from a step on, empty ones included."""
    step = start
    while True:
        for ticket in deal.step(world()[0], step):
            found = [row(abs(ticket) * rows + k) for k in range(rows)]
            ids, lengths = np.stack([i for i, _ in found]), [n for _, n in found]
            if ticket == EMPTY:
                lengths = [[] for _ in found]
            yield ticket, Batch.from_rows(ids, lengths, [0] * rows)
        step += 1


def settings(kind: str = BLENDED, micro_batches: int = 3, **changes: Any) -> TrainingSettings:
    values = {
        "max_steps": 20, "batch_size": ROWS_PER_STEP // micro_batches, "max_seq_length": 24,
        "gradient_accumulation_steps": micro_batches, "log_every": 1, "logits_chunk": 37,
        # A small rate: rounding is discontinuous, so a last bit may become a code that flips.
        "optimizer": {"type": "adamw", "lr": 3e-3 if kind == DENSE else 3e-5},
        "lambda_warmup": {"warmup_steps": 0 if kind == TERNARY else 16},
        "objectives": {} if kind == DENSE else OBJECTIVES,
    } | changes  # fmt: skip
    return TrainingSettings.model_validate(values)


def loop(kind: str, given: TrainingSettings) -> tuple[Loop, Keep]:
    torch.manual_seed(0)
    model = build_model(CONFIG)
    model = model if kind == DENSE else to_bitnet(model, "paper")
    wrapped = parallelize(LossModel(model, given.logits_chunk), given, CPU)
    torch.manual_seed(1)
    dense = build_model(CONFIG | {"initializer_range": 0.2}).requires_grad_(False)
    kept = Keep()
    made = Loop(
        "here", wrapped, given.optimizer.build(wrapped), given, CPU, autocast_for(CPU, "auto"),
        teacher=None if kind == DENSE else InProcessTeacher(dense, autocast_for(CPU, "auto")),
        sinks=[kept],
    )  # fmt: skip
    return made, kept


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


def trained(kind: str, given: TrainingSettings, resumed: str | None = None) -> dict[str, Any]:
    """Losses of all steps, final weights and codes, and held-out losses before and after."""
    run, kept = loop(kind, given)
    start = 0
    if resumed:
        run.position, held = state.resume(resumed, run.model, run.optimizer, Resume())
        assert held is not None
        run.data_step = start = held["step"]
    deal = Deal(given.gradient_accumulation_steps, world()[1])
    run.run(tickets(deal, given.batch_size, start))
    return {
        "losses": kept.values,
        "weights": {name: whole(p) for name, p in run.model.model.named_parameters()},
        "codes": [layer.quantized()[0] for layer in bit_linears(run.model)],
        "held out": evaluate(run.model, held_out(), CPU, autocast_for(CPU, "auto")),
        "after": run,
    }


def held_out() -> dict[str, list[Batch]]:
    """Two domains, of three batches and of one: the last round leaves a worker out."""
    made = []
    for number in range(4):
        found = [row(10_000 + number * 4 + k) for k in range(4)]
        ids, lengths = np.stack([i for i, _ in found]), [n for _, n in found]
        made.append(Batch.from_rows(ids, lengths, [0] * 4))
    return {"a": made[:3], "b": made[3:]}


SHORT = {
    "max_steps": 8, "lambda_warmup": {"warmup_steps": 6},
    "saliency_curriculum": {"enabled": True, "initial_k": 0.3, "update_interval": 2},
    "activation_sparsity": {"enabled": True, "mode": "block", "n": 3, "m": 5},
}  # fmt: skip


def everything(folder: Path) -> dict[str, Any]:
    """What is compared, by name; run by two workers and by one."""
    found = {kind: trained(kind, settings(kind)) for kind in (DENSE, BLENDED, TERNARY)}
    found["short"] = trained(BLENDED, settings(**SHORT))
    found["checkpointed"] = trained(BLENDED, settings(**SHORT, activation_checkpointing=True))
    found["cut into 1"] = trained(BLENDED, settings(micro_batches=1, **SHORT))
    found["cut into 6"] = trained(BLENDED, settings(micro_batches=6, **SHORT))

    half = settings(**SHORT)
    run, kept = loop(BLENDED, half)
    run.hooks = [Every(3, stop)]
    run.run(tickets(Deal(3, world()[1]), half.batch_size))
    directory = f"{folder}/of_{world()[1]}"
    held = state.as_json(run.position, {"step": run.data_step})
    state.save(directory, run.model, run.optimizer, held, {})
    found["resumed"] = trained(BLENDED, half, directory)
    found["resumed"]["losses"] = kept.values + found["resumed"]["losses"]
    found["poisoned"] = poisoned()
    for each in found.values():
        each.pop("after", None)
    return found


def poisoned() -> dict[str, Any]:
    """Four steps; in the third the gradients of the last worker are not finite."""
    given = settings(**SHORT | {"max_steps": 4}, zclip={"enabled": True})
    run, kept = loop(BLENDED, given)
    embedding = run.model.model.model.embed_tokens
    bad = world()[0] == world()[1] - 1

    def poison(_: torch.nn.Module, __: Any, out: torch.Tensor) -> torch.Tensor:
        if bad and run.position.step == 2 and out.requires_grad:
            out.register_hook(lambda grad: grad * float("nan"))
        return out

    embedding.register_forward_hook(poison)
    run.run(tickets(Deal(3, world()[1]), given.batch_size))
    return {
        "losses": kept.values,
        "weights": {name: whole(p) for name, p in run.model.model.named_parameters()},
        "held out": [run.position.skipped, *run.position.norms],
    }


def unread() -> list[Any]:
    """The stream of the last worker breaks in the third step: how far each worker came, and what
    it was told."""
    given = settings(DENSE, **SHORT)
    run, _ = loop(DENSE, given)

    def breaking() -> Iterator[tuple[int, Batch]]:
        for each in tickets(Deal(3, world()[1]), given.batch_size):
            if run.data_step == 2 and world()[0] == world()[1] - 1:
                raise UserError("a shard is gone")
            yield each

    with pytest.raises(UserError) as caught:
        run.run(breaking())
    return [run.position.step, str(caught.value)]


def lagging() -> dict[str, Any]:
    """The second worker sleeps in each layer, forward or back: every worker's own seconds, step by
    step, and what was said of it."""
    found = {}
    for way in ("forward", "back", "back, checkpointed"):
        given = settings(DENSE, max_steps=12, activation_checkpointing="checkpointed" in way)
        run, _ = loop(DENSE, given)
        seen: list[list[float]] = []
        said: list[str] = []
        run.say, note = said.append, run.stragglers.note
        run.stragglers.note = lambda own, step, note=note, seen=seen: (  # type: ignore[misc]
            seen.append(list(own)) or note(own, step)
        )

        def sleep(_: Any, __: Any, out: torch.Tensor, way: str = way) -> None:
            if world()[0] == 0:
                return
            if way == "forward":
                time.sleep(0.05)
            else:
                out.register_hook(lambda _: time.sleep(0.05))

        for layer in decoder_layers(run.model.model):
            layer.get_submodule("mlp").register_forward_hook(sleep)
        run.run(tickets(Deal(3, world()[1]), given.batch_size))
        found[way] = (seen, said)
    return found


def stop(run: Loop) -> None:
    """A hook that stops a run."""
    run.stopped = True


def link(folder: Path, kind: str, size: int) -> list[float]:
    """Five of twenty steps, from where so many workers less one stopped: on one, two, three, four
    workers in turn the whole."""
    given = settings(kind)
    run, kept = loop(kind, given)
    if size > 1:
        run.position, held = state.resume(
            f"{folder}/{kind}_{size - 1}", run.model, run.optimizer, Resume()
        )
        assert held is not None
        run.data_step = held["step"]
    run.hooks = [Every(5 * size, stop)]
    run.run(tickets(Deal(3, world()[1]), given.batch_size, run.data_step))
    held = state.as_json(run.position, {"step": run.data_step})
    state.save(f"{folder}/{kind}_{size}", run.model, run.optimizer, held, {})
    return kept.values


def some(folder: Path, size: int) -> dict[str, list[float]]:
    """Losses of a link of each chain, and of whole runs where `everything` has none."""
    found = {f"{kind} link": link(folder, kind, size) for kind in (DENSE, BLENDED)}
    for kind in (DENSE, BLENDED) if size > 3 else ():
        found[kind] = trained(kind, settings(kind))["losses"]
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("parallel")


@pytest.fixture(scope="module")
def two(folder: Path) -> dict[str, Any]:
    first, second = ranks.run(everything, folder, folder)
    for name, found in second.items():
        assert found["held out"] == first[name]["held out"], "all workers know the same numbers"
    return first


@pytest.fixture(scope="module")
def one(two: dict[str, Any], folder: Path) -> dict[str, Any]:
    torch.set_num_threads(1)
    return everything(folder)


@pytest.fixture(scope="module")
def chain(folder: Path) -> dict[int, dict[str, list[float]]]:
    """Number of workers -> losses, of workers who take turns."""
    torch.set_num_threads(1)
    found = {1: some(folder, 1)}
    for size in (2, 3, 4):
        found[size] = ranks.run(some, folder, folder, size, size=size)[0]
    return found


@pytest.mark.parametrize("kind", [DENSE, BLENDED])
def test_one_two_three_and_four_workers_take_turns(kind: str, chain: Any, one: Any) -> None:
    """Each group goes on from the checkpoint of a smaller one."""
    losses = [loss for size in (1, 2, 3, 4) for loss in chain[size][f"{kind} link"]]
    assert len(losses) == 20
    np.testing.assert_allclose(losses, one[kind]["losses"], rtol=1e-5)


@pytest.mark.parametrize("kind", [DENSE, BLENDED])
def test_four_workers_give_the_losses_of_one(kind: str, chain: Any, one: Any) -> None:
    """At three micro-batches a step one of them has nothing to do."""
    np.testing.assert_allclose(chain[4][kind], one[kind]["losses"], rtol=1e-5)


@pytest.mark.parametrize("kind", [DENSE, BLENDED, TERNARY])
def test_two_workers_give_the_losses_of_one(kind: str, two: Any, one: Any) -> None:
    """Three micro-batches for two workers, rows of 3 to 24 tokens, two losses with a teacher."""
    assert len(one[kind]["losses"]) == 20
    np.testing.assert_allclose(two[kind]["losses"], one[kind]["losses"], rtol=1e-5)
    for domain, loss in one[kind]["held out"].items():
        assert two[kind]["held out"][domain] == pytest.approx(loss, rel=1e-5)
    begin = dict(loop(kind, settings(kind))[0].model.model.named_parameters())
    for name, value in one[kind]["weights"].items():
        way, apart = value - begin[name].detach(), two[kind]["weights"][name] - value
        assert apart.norm() < 0.01 * way.norm(), f"{name} went another way"
    flips = [
        int((a != b).sum()) for a, b in zip(two[kind]["codes"], one[kind]["codes"], strict=True)
    ]
    assert sum(flips) <= 1


def test_activation_checkpointing_changes_no_bit(two: Any, one: Any) -> None:
    for found in (two, one):
        assert found["checkpointed"]["losses"] == found["short"]["losses"]
        # the wrapper is a level of its own in the tree of modules
        again = {
            name.replace("_checkpoint_wrapped_module.", ""): value
            for name, value in found["checkpointed"]["weights"].items()
        }
        for name, value in found["short"]["weights"].items():
            assert torch.equal(again[name], value)


@pytest.mark.parametrize("pieces", ["cut into 1", "cut into 6"])
def test_the_same_global_batch_cut_up_differently(pieces: str, two: Any, one: Any) -> None:
    """One micro-batch leaves the second worker with nothing; six give each of them three."""
    for found in (two, one):
        np.testing.assert_allclose(found[pieces]["losses"], one["short"]["losses"], rtol=1e-5)


def test_resume_is_bit_equal_on_the_same_number_of_workers(two: Any, one: Any) -> None:
    for found in (two, one):
        assert found["resumed"]["losses"] == found["short"]["losses"]
        for name, value in found["short"]["weights"].items():
            assert torch.equal(found["resumed"]["weights"][name], value)


def test_a_gradient_that_is_not_finite_on_one_worker_skips_the_step_on_all(
    two: Any, one: Any
) -> None:
    """All workers skipped it, counted it, and kept it out of the averages: those of ranks are
    compared where they are read."""
    for found in (two, one):
        skipped, seen, mean, variance = found["poisoned"]["held out"]
        assert (skipped, seen) == (1, 3)
        assert math.isfinite(mean) and math.isfinite(variance)
        losses = found["poisoned"]["losses"]
        assert math.isnan(losses[2]) and all(map(math.isfinite, losses[:2] + losses[3:]))
        assert all(value.isfinite().all() for value in found["poisoned"]["weights"].values())
    np.testing.assert_allclose(
        two["poisoned"]["losses"], one["poisoned"]["losses"], rtol=1e-5, equal_nan=True
    )


def test_a_worker_that_is_slow_in_its_layers_is_named_and_the_wait_for_it_is_not_work(
    folder: Path,
) -> None:
    """Two layers, two micro-batches a step: 0.2 s of sleep in each."""
    first, _ = ranks.run(lagging, folder)
    for way, (seen, said) in first.items():
        others, slow = np.median(seen[1:], axis=0)
        assert slow >= 0.2 and others < slow / 2, way
        (told,) = said
        assert "step 9: worker 1 is slow" in told, way


def test_rows_that_one_worker_cannot_read_stop_all_at_the_same_step(folder: Path) -> None:
    """None of them waits for the one that has no more batches."""
    for step, said in ranks.run(unread, folder):
        assert step == 2 and said.endswith("step 2: a shard is gone")


def test_one_worker_continues_what_two_began(one: Any, folder: Path) -> None:
    rest = trained(BLENDED, settings(**SHORT), f"{folder}/of_2")
    np.testing.assert_allclose(rest["losses"], one["short"]["losses"][3:], rtol=1e-5)


LATER: dict[str, Any] = {
    "objectives": {**OBJECTIVES, "attention_distill": {"weight": 0}},
    "curriculum": {"phases": [{"until": 0.5}, {"until": 1, "weights": {"attention_distill": 1}}]},
}


def test_a_layer_whose_attention_is_ever_distilled_is_not_compiled() -> None:
    """Its projections have hooks, which a compiled forward does not run."""
    given = settings(torch_compile={"enabled": True}, **LATER)
    run, _ = loop(BLENDED, given)
    compiled = ["forward" in vars(layer) for layer in decoder_layers(run.model.model)]
    assert compiled == [True, False]


def full(folder: Path) -> dict[str, tuple[int, int | None]]:
    """What each of the places where rank 0 alone writes raises, and at which step."""

    def fill(run: Loop) -> None:
        for sink in run.sinks:
            sink.file = open("/dev/full", "w")  # type: ignore[attr-defined]  # noqa: SIM115

    def opened(uri: str) -> Any:
        return on_rank_zero(lambda: [JsonLines(uri, "here", 0)]) or ()

    run, _ = loop(DENSE, settings(DENSE))
    run.sinks = opened(f"{folder}/metrics_{world()[1]}.jsonl")
    run.hooks = [Every(3, fill)]
    autocast = autocast_for(CPU, "auto")
    kept = HeldOut(str(folder / "a_file" / "run"), {}, CPU, autocast, Clock())
    (folder / "a_file").touch()
    doings = {
        "log": lambda: run.run(tickets(Deal(3, world()[1]), run.settings.batch_size)),
        "opening": lambda: opened(f"{folder}/a_file/run/metrics.jsonl"),
        "evaluation": lambda: kept.record("here", {"a": 1.0}),
    }
    found = {}
    for name, doing in doings.items():
        with pytest.raises(OSError) as raised:
            doing()
        found[name] = (run.position.step, raised.value.errno)
    return found


def test_what_rank_zero_cannot_write_stops_all_workers_at_the_same_step(folder: Path) -> None:
    """Else the others would wait in their next collective for the one that has gone."""
    first, second = ranks.run(full, folder, folder)
    assert first == second
    assert first["log"] == (4, errno.ENOSPC)
    assert first["opening"] == first["evaluation"] == (4, errno.ENOTDIR)


def _compiled(_: int) -> None:
    """Attention is distilled in the second half only."""
    changes = SHORT | {"max_steps": 4, "lambda_warmup": {"warmup_steps": 2}, **LATER}
    compiled = trained(BLENDED, settings(torch_compile={"enabled": True}, **changes))
    plain = trained(BLENDED, settings(**changes))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    np.testing.assert_allclose(compiled["losses"], plain["losses"], rtol=1e-5)
    assert list(compiled["weights"]) == list(plain["weights"])


@pytest.mark.slow
def test_compiled_blocks_give_the_same_losses() -> None:
    """In a process of its own, where no shapes are checked: a compiler cannot see through that."""
    ranks.start(_compiled, size=1)

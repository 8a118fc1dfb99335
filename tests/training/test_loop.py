"""The one loop, in process, on a tiny model and a plan of made-up rows."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from keep import Keep

from bitray import checkpoint
from bitray.models.batch import IGNORED, Batch
from bitray.models.convert import to_bitnet
from bitray.models.loading import build_model
from bitray.models.losses import LossModel, TeacherOutput, Term
from bitray.objectives import Objectives
from bitray.settings import UserError
from bitray.training import state
from bitray.training.loop import Every, Loop, autocast_for
from bitray.training.metrics import Console, JsonLines
from bitray.training.settings import Resume, TrainingSettings
from bitray.training.spikes import Spike
from bitray.training.state import Position
from bitray.training.teacher import InProcessTeacher

CONFIG = {
    "model_type": "llama", "vocab_size": 61, "hidden_size": 32, "intermediate_size": 64,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 64, "tie_word_embeddings": True,
}  # fmt: skip
CPU = torch.device("cpu")


def batch(ticket: int, rows: int = 2) -> Batch:
    draw = np.random.default_rng(ticket)
    ids = draw.integers(0, 61, (rows, 24)).astype(np.int32)
    ids[:, 1:] = (ids[:, :1] * 7 + np.arange(1, 24)) % 61  # something that can be learnt
    return Batch.from_rows(ids, [[10, 12]] * rows, [0] * rows)


def tickets(start: int = 0) -> Iterator[tuple[int, Batch]]:
    ticket = start
    while True:
        yield ticket, batch(ticket)
        ticket += 1


def settings(**changes: object) -> TrainingSettings:
    values = {
        "max_steps": 8, "batch_size": 2, "gradient_accumulation_steps": 2, "max_seq_length": 24,
        "log_every": 1, "optimizer": {"type": "adamw", "lr": 3e-3},
        "lambda_warmup": {"warmup_steps": 4},
    } | changes  # fmt: skip
    return TrainingSettings.model_validate(values)


def loop(given: TrainingSettings, **parts: object) -> Loop:
    torch.manual_seed(0)
    model = LossModel(to_bitnet(build_model(CONFIG), "paper"))
    optimizer = given.optimizer.build(model)
    return Loop("here", model, optimizer, given, CPU, autocast_for(CPU, "auto"), **parts)  # type: ignore[arg-type]


def weights(of: Loop) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in of.model.state_dict().items()}


def test_it_learns_and_strength_and_rates_follow_the_step(tmp_path: Path) -> None:
    sink = JsonLines(str(tmp_path / "metrics.jsonl"), "here", 0)
    run = loop(settings(max_steps=30), sinks=[sink, Console(30)])
    run.run(tickets())
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 31))
    assert lines[-1]["train/loss"] < 0.8 * lines[0]["train/loss"]
    strengths = [line["schedule/strength"] for line in lines]
    assert strengths[:5] == [0.0, 0.25, 0.5, 0.75, 1.0] and set(strengths[5:]) == {1.0}
    assert lines[-1]["train/tokens"] == 30 * 4 * 22
    assert lines[0]["train/padding"] == pytest.approx(2 / 24)


def test_a_resumed_run_ends_bit_equal(tmp_path: Path) -> None:
    """At every step: state is tensors and a position, everything else a function of the step."""
    given = settings(
        zclip={"enabled": True, "warmup_steps": 2, "threshold": 0.1}, max_grad_norm=None,
        saliency_curriculum={"enabled": True, "initial_k": 0.4, "update_interval": 2},
        activation_sparsity={"enabled": True},
    )  # fmt: skip
    clipped = Keep("train/zclipped_steps")
    whole = loop(given, sinks=[clipped])
    whole.run(tickets())
    assert sum(clipped.values) > 0
    for stop in (1, 3, 7):
        directory = str(tmp_path / f"{stop}")
        half = loop(given)
        half.hooks = [Every(stop, lambda each: setattr(each, "stopped", True))]
        half.run(tickets())
        data = {"step": half.data_step}
        state.save(directory, half.model, half.optimizer, state.as_json(half.position, data), {})
        rest = loop(given)
        with torch.no_grad():
            for parameter in rest.model.parameters():
                parameter.zero_()
        rest.position, held = state.resume(directory, rest.model, rest.optimizer, Resume())
        assert held is not None and rest.position.step == stop
        rest.data_step = held["step"]
        rest.run(tickets(2 * rest.data_step))
        for name, value in weights(whole).items():
            assert torch.equal(value, weights(rest)[name]), name


def test_what_an_optimizer_reports_is_logged() -> None:
    kept = Keep("train/max_attention_logit")
    loop(settings(optimizer={"type": "muonclip"}), sinks=[kept]).run(tickets())
    assert len(kept.values) == 8 and all(value > 0 for value in kept.values)


def test_resume_flags_leave_out_what_they_say(tmp_path: Path) -> None:
    run = loop(settings())
    run.run(tickets())
    directory = str(tmp_path / "a")
    state.save(directory, run.model, run.optimizer, state.as_json(run.position, {"x": 1}), {})
    fresh = loop(settings())
    flags = Resume(load_training_state=False, load_data_state=False, load_optimizer_state=False)
    position, data = state.resume(directory, fresh.model, fresh.optimizer, flags)
    assert (position.step, position.schedule_step, data) == (0, 8, None)
    assert not fresh.optimizer.state
    flags = Resume(load_scheduler_state=False)
    position, data = state.resume(directory, fresh.model, fresh.optimizer, flags)
    assert (position.step, position.schedule_step, data) == (8, 0, {"x": 1})
    assert fresh.optimizer.state


def test_a_stage_that_is_resumed_at_its_first_step_has_all_of_its_data(tmp_path: Path) -> None:
    """`load_training_state=false` alone: where the checkpoint stood in them, too few are left."""
    directory, half = str(tmp_path), loop(settings())
    half.hooks = [Every(5, lambda each: setattr(each, "stopped", True))]
    half.run(tickets())
    data = {"step": half.data_step}
    state.save(directory, half.model, half.optimizer, state.as_json(half.position, data), {})
    rest = loop(settings())
    flags = Resume(load_training_state=False)
    rest.position, held = state.resume(directory, rest.model, rest.optimizer, flags)
    rest.data_step = held["step"] if held else 0
    rest.run(islice(tickets(2 * rest.data_step), 2 * (8 - rest.data_step)))
    assert rest.at_end and rest.position.step == 8


def test_what_a_lenient_resume_leaves_out_is_said(tmp_path: Path) -> None:
    """Another vocabulary, no third layer any more, and norms that the checkpoint does not have."""
    said: list[str] = []
    then = LossModel(to_bitnet(build_model({**CONFIG, "num_hidden_layers": 3}), "none"))
    checkpoint.save(str(tmp_path), state.tensors_of(then, None), {}, {})
    here = LossModel(to_bitnet(build_model({**CONFIG, "vocab_size": 53}), "paper"))
    state.load_model(str(tmp_path), here, False, said.append)
    (line,) = said
    head, *groups = line.replace(": ", "; ", 1).split("; ")
    assert head == f"not loaded from {tmp_path}"
    mine, theirs, other = groups
    assert mine.startswith("only the model has model.layers.0.mlp.down_proj.subln.weight, ")
    assert mine.count(".subln.weight") == mine.count(",") + 1 == 4
    assert theirs.startswith("only the checkpoint has model.layers.2.input_layernorm.weight, ")
    assert theirs.count("model.layers.2.") == theirs.count(",") + 1 == 9
    assert other.startswith("of another shape are ") and "model.embed_tokens.weight" in other
    queries = [each.model.model.layers[0].self_attn.q_proj.weight for each in (then, here)]
    assert torch.equal(*queries)
    said.clear()
    state.load_model(str(tmp_path), then, False, said.append)
    assert said == []


def test_cutting_the_batch_up_differently_changes_nothing() -> None:
    """Sums over counts of the whole global batch: 4 x 1 row, 2 x 2 rows and 1 x 4 rows agree."""
    four = [batch(ticket, 1) for ticket in range(40)]
    ragged = [
        Batch(b.input_ids, torch.where(torch.rand(1, 24, generator=_seeded(i)) < i % 4 / 4, IGNORED,
              b.labels), b.position_ids, b.source_id, b.real)
        for i, b in enumerate(four)
    ]  # fmt: skip

    def joined(rows: int) -> Iterator[tuple[int, Batch]]:
        for ticket in range(40 // rows):
            part = ragged[ticket * rows : (ticket + 1) * rows]
            fields = ("input_ids", "labels", "position_ids", "source_id", "real")
            yield ticket, Batch(*(torch.cat([getattr(b, f) for b in part]) for f in fields))

    curves = []
    for rows in (1, 2, 4):
        kept = Keep("train/loss")
        # A small rate: rounding is discontinuous, so a last bit may become a code that flips.
        given = settings(batch_size=rows, gradient_accumulation_steps=4 // rows,
                         optimizer={"type": "adamw", "lr": 1e-4})  # fmt: skip
        loop(given, sinks=[kept]).run(joined(rows))
        curves.append(kept.values)
    np.testing.assert_allclose(curves[1], curves[0], rtol=1e-5)
    np.testing.assert_allclose(curves[2], curves[0], rtol=1e-5)


def _seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_an_objective_of_weight_zero_costs_no_teacher() -> None:
    objectives = {"logits_distill": {"weight": 0.0}}
    run = loop(settings(objectives=objectives))  # no teacher is given
    run.run(tickets())
    assert run.position.step == 8


def test_a_problem_with_the_batches_of_a_step_stops_before_it() -> None:
    """As where a remote teacher does not answer: the weights stay those of the last whole step."""
    asked = []

    def problem(batches: Sequence[Batch]) -> str | None:
        asked.append(len(batches))
        return "the teacher is gone" if len(asked) == 3 else None

    run = loop(settings(), problem_with=problem)
    with pytest.raises(UserError, match=r"step 2: the teacher is gone"):
        run.run(tickets())
    assert run.position.step == 2 and len(set(asked)) == 1 and asked[0] > 0


class Asked:
    """A teacher that notes at which steps it is asked."""

    def __init__(self) -> None:
        dense = build_model(CONFIG).requires_grad_(False)
        self.real = InProcessTeacher(dense, autocast_for(CPU, "auto"))
        self.steps: list[int] = []
        self.run: Loop | None = None

    def __call__(self, batch: Batch, layers: bool, attention: int | None = None) -> TeacherOutput:
        assert self.run is not None
        self.steps.append(self.run.position.step)
        return self.real(batch, layers, attention)


def test_a_teacher_is_asked_only_in_the_phases_that_need_it() -> None:
    phases = [{"until": 0.25, "weights": {"logits_distill": 0}},
              {"until": 0.75, "weights": {"logits_distill": 1, "continue_pretrain": 0}},
              {"until": 1.0, "weights": {"logits_distill": 0}}]  # fmt: skip
    given = settings(objectives={"logits_distill": {"weight": 3}}, curriculum={"phases": phases})
    teacher = Asked()
    run = loop(given, teacher=teacher)
    teacher.run = run
    run.run(tickets())
    assert teacher.steps == [step for step in (2, 3, 4, 5) for _ in range(2)]
    assert given.needs_teacher
    never = {"phases": [{"until": 1.0, "weights": {"logits_distill": 0}}]}
    assert not settings(
        objectives={"logits_distill": {"weight": 3}}, curriculum=never
    ).needs_teacher


def test_distillation_pulls_the_student_to_its_teacher() -> None:
    torch.manual_seed(1)
    dense = build_model(CONFIG | {"initializer_range": 0.2}).requires_grad_(False)
    teacher = InProcessTeacher(dense, autocast_for(CPU, "auto"))
    objectives = Objectives.model_validate(
        {"continue_pretrain": None, "logits_distill": {"weight": 1.0, "temperature": 1.0},
         "hidden_distill": {"weight": 1.0}}
    )  # fmt: skip
    kept, cosine = Keep("train/logits_distill_loss"), Keep("train/hidden_distill_cosine")
    given = settings(objectives=objectives, max_steps=40)
    loop(given, teacher=teacher, sinks=[kept, cosine]).run(tickets())
    assert kept.values[-1] < 0.9 * kept.values[0]
    assert -1 <= cosine.values[0] < cosine.values[-1] <= 1


BITDISTILL = {
    "continue_pretrain": {"weight": 1.0}, "logits_distill": {"weight": 2.0, "temperature": 5.0},
    "attention_distill": {"weight": 1.0},
}  # fmt: skip


def distilled(sinks: list[Keep], **changes: object) -> Loop:
    torch.manual_seed(1)
    dense = build_model(CONFIG | {"initializer_range": 0.2}).requires_grad_(False)
    teacher = InProcessTeacher(dense, autocast_for(CPU, "auto"))
    return loop(settings(**{"objectives": BITDISTILL} | changes), teacher=teacher, sinks=sinks)


def norm(run: Loop) -> float:
    return math.sqrt(sum(float(p.grad.square().sum()) for p in run.model.parameters()))


def test_gamma_makes_the_attention_gradient_a_tenth_of_the_cross_entropys(tmp_path: Path) -> None:
    """Measured at full strength on the first step's whole batch, here against plain autograd."""
    kept = Keep("schedule/attention_distill_weight")
    run = distilled([kept], max_steps=3)
    found = {}
    for name in ("continue_pretrain", "attention_distill"):
        objective = getattr(run.settings.objectives, name)
        term = Term(name, objective, 1.0)
        first = [b for _, b in zip(range(2), (batch(n) for n in range(2)), strict=True)]
        for b in first:
            told = run.teacher(b, False, -1)
            head, attention = ([], term) if name == "attention_distill" else ([term], None)
            scale = 1 / sum(int(objective.count(each)) for each in first)
            (run.model(b, head, [], told, attention=attention)[0] * scale).backward()
        found[name] = norm(run)
        run.model.zero_grad()
    run.run(tickets())
    expected = 0.1 * found["continue_pretrain"] / found["attention_distill"]
    assert kept.values == [pytest.approx(expected, rel=1e-5)] * 3
    held = json.loads(json.dumps(state.as_json(run.position, None)))
    assert Position.from_json(held["position"]).factors == {"attention_distill": kept.values[0]}
    rest = distilled([kept], max_steps=5)
    rest.position = Position.from_json(held["position"])
    rest.data_step = 20  # other rows, the same gamma
    rest.run(tickets(40))
    assert kept.values == [kept.values[0]] * 5


def test_gradient_norms_are_logged_and_leave_no_trace() -> None:
    kept = Keep("train/loss")
    lines: list[Mapping[str, float]] = []
    kept.write = lambda stage, step, metrics: lines.append(metrics)  # type: ignore[method-assign]
    often, seldom = (distilled([kept], grad_norms_every=n) for n in (2, 100))
    for run in (often, seldom):
        run.run(tickets())
    for name, value in weights(often).items():
        assert torch.equal(value, weights(seldom)[name]), name
    measured = [step for step, line in enumerate(lines) if "train/grad_norm_logits_distill" in line]
    assert measured == [0, 2, 4, 6, 8]
    for name in BITDISTILL:
        assert lines[0][f"train/grad_norm_{name}"] > 0
    ratio = lines[2]["train/grad_norm_attention_distill"]
    assert 0.01 < ratio / lines[2]["train/grad_norm_continue_pretrain"] < 1


def test_a_gamma_that_cannot_be_measured_is_refused() -> None:
    alone = BITDISTILL | {"continue_pretrain": None}
    with pytest.raises(UserError, match="attention_distill: its factor cannot be measured"):
        distilled([], objectives=alone).run(tickets())
    fixed = BITDISTILL | {"attention_distill": {"gamma": 3.0, "weight": 0.5}}
    kept = Keep("schedule/attention_distill_weight")
    distilled([kept], objectives=fixed).run(tickets())
    assert set(kept.values) == {1.5}


def test_a_gradient_that_is_not_finite_skips_the_step_and_poisons_nothing() -> None:
    run = loop(settings(max_skipped_steps=2))
    before = weights(run)
    poison = run.model.model.model.norm.weight.register_hook(lambda grad: grad * math.nan)
    with pytest.raises(FloatingPointError, match="not finite for 2 steps in a row"):
        run.run(tickets())
    assert run.position.skipped == 2
    for name, value in before.items():
        assert torch.equal(value, weights(run)[name])
    poison.remove()
    run.position, run.data_step = Position(), 0
    run.run(tickets())
    assert all(value.isfinite().all() for value in weights(run).values())


def test_a_skipped_step_is_in_no_average() -> None:
    """One poisoned step in a window of four: its tokens count, its loss does not."""
    kept, clean = Keep("train/loss"), Keep("train/loss")
    run = loop(settings(max_steps=4, log_every=4), sinks=[kept], sources=("a",))
    poison = run.model.model.model.norm.weight.register_hook(
        lambda grad: grad * (math.nan if run.position.step == 3 else 1)
    )
    run.run(tickets())
    assert run.position.skipped == 1 and run.position.step == 4
    three = loop(settings(max_steps=4, log_every=3), sinks=[clean])
    three.hooks = [Every(3, lambda each: setattr(each, "stopped", True))]
    three.run(tickets())
    assert kept.values == [pytest.approx(clean.values[0], rel=1e-6)]
    assert run.source_sums[0].item() == 4 * 4 * 22 and run.source_sums[2].item() == 3 * 4 * 20
    for name, value in weights(three).items():
        assert torch.equal(value, weights(run)[name])
    poison.remove()


def spoilt(steps: range, start: int = 0) -> Iterator[tuple[int, Batch]]:
    """The same documents again and again, two tickets a step; some steps have wrong labels."""
    for ticket, _ in tickets(start):
        found = batch(0)
        wrong = torch.where(found.labels >= 0, 60, found.labels)
        yield ticket, replace(found, labels=wrong) if ticket // 2 in steps else found


SPIKY: dict[str, object] = {
    "max_steps": 24, "optimizer": {"type": "adamw", "lr": 1e-2},
    "loss_spike": {"warmup_steps": 10, "threshold": 3.0, "ema": 0.8},
}  # fmt: skip


def test_a_loss_that_stands_out_is_told_with_its_tickets() -> None:
    told: list[Spike] = []
    losses = Keep("train/loss")
    run = loop(settings(**SPIKY), on_spike=told.append, sinks=[losses])
    run.run(spoilt(range(18, 19)))
    assert [(spike.step, spike.tickets) for spike in told] == [(18, (36, 37))]
    assert told[0].loss == pytest.approx(losses.values[18], rel=1e-6)
    assert told[0].loss > 1.5 * told[0].mean
    assert run.position.losses.seen == 24


def test_steps_that_are_left_out_are_drawn_and_change_nothing() -> None:
    run, short = (loop(settings(max_steps=8), sources=("a",)) for _ in range(2))
    run.left_out = [range(5, 8)]
    run.run(tickets())
    short.hooks = [Every(5, lambda each: setattr(each, "stopped", True))]
    short.run(tickets())
    for name, value in weights(short).items():
        assert torch.equal(value, weights(run)[name])
    assert (run.position.step, run.position.schedule_step, run.position.skipped) == (8, 8, 3)
    assert run.data_step == 8 and run.position.tokens == 8 * 4 * 22


def test_groups_follow_schedules_of_their_own() -> None:
    own = {"no_decay": {"type": "linear", "warmup_steps": 0, "min_ratio": 0.5}}
    kept = [Keep(f"schedule/lr_{name}") for name in ("decay", "no_decay")]
    given = settings(
        optimizer={"type": "adamw", "lr": 1e-3, "group_lr": {"no_decay": 8e-3},
                   "group_schedule": own}, schedule={"type": "constant", "warmup_steps": 0},
    )  # fmt: skip
    loop(given, sinks=kept).run(tickets())
    assert kept[0].values == [1e-3] * 8
    assert kept[1].values == pytest.approx([8e-3 * (1 - step / 16) for step in range(8)])


def test_a_batch_without_any_label_is_refused() -> None:
    def masked() -> Iterator[tuple[int, Batch]]:
        for ticket, b in tickets():
            labels = torch.full_like(b.labels, IGNORED)
            yield ticket, Batch(b.input_ids, labels, b.position_ids, b.source_id, b.real)

    with pytest.raises(UserError, match="not one token to learn from"):
        loop(settings()).run(masked())


def test_a_wish_to_stop_is_heard_after_the_step_and_hooks_run_once_more() -> None:
    wishes = iter([False, False, True])
    saved: list[int] = []
    run = loop(
        settings(),
        stop_requested=lambda: next(wishes),
        hooks=[Every(100, lambda each: saved.append(each.position.step))],
    )
    run.run(tickets())
    assert run.stopped and run.position.step == 3 and saved == [3]


def test_metrics_of_steps_taken_again_replace_the_first_ones(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    sink = JsonLines(str(path), "a", 0)
    for step in (1, 2, 3):
        sink.write("a", step, {"x": float(step)})
    sink.close()
    path.write_text(path.read_text() + '{"stage": "a", "st')  # torn by a crash
    again = JsonLines(str(path), "a", 2)
    again.write("a", 3, {"x": 33.0})
    again.close()
    assert [json.loads(line)["x"] for line in path.read_text().splitlines()] == [1.0, 2.0, 33.0]

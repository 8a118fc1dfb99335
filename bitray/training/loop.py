"""The one training loop. Stages, objectives, optimizers, teachers and workers enter it as data."""

import hashlib
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

from bitray.data.tickets import Deal
from bitray.models.batch import Batch
from bitray.models.losses import LossModel, Metrics, Term
from bitray.nn.curricula import set_saliency, set_sparsity, track_columns, update_columns
from bitray.nn.linear import set_strength
from bitray.optim import Norms, clip_grad_norm, set_learning_rates
from bitray.settings import Passing, UserError
from bitray.training.goodput import PRODUCTIVE, Clock
from bitray.training.metrics import Sink, write_all
from bitray.training.parallel import (
    all_gather_objects,
    all_reduce_sums,
    on_rank_zero,
    synchronize_gradients,
    world,
)
from bitray.training.settings import TrainingSettings
from bitray.training.spikes import Spike
from bitray.training.state import Position
from bitray.training.teacher import Teacher
from bitray.training.watch import OwnWork, Stragglers
from bitray.training.window import Window, summary, worker_metrics

Tickets = Iterator[tuple[int, Batch]]
"""Numbered micro-batches of one worker, from `data_step` on (see `data.tickets`)."""


_MEASURE = "continue_pretrain"
"""Whose gradient others are measured by."""


class Every(NamedTuple):
    """Side work: `fn(loop)` after every `period` steps, the last one, and where a run stops."""

    period: int
    fn: Callable[["Loop"], None]
    cause: str = "other"
    """What its time is counted as (see `training.goodput`)."""


def seed_of(*parts: object) -> int:
    """A seed that is a function of what it is for, so that no generator has to be saved."""
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=7).digest()
    return int.from_bytes(digest, "big")


class Pass(NamedTuple):
    """One forward: a view of a micro-batch and the objectives that ride on it."""

    clean: Batch
    view: Batch
    names: list[str]


@dataclass
class Loop:
    """One stage on one worker."""

    stage: str
    model: LossModel
    optimizer: torch.optim.Optimizer
    settings: TrainingSettings
    device: torch.device
    autocast: torch.autocast
    teacher: Teacher | None = None
    position: Position = field(default_factory=Position)
    hooks: Sequence[Every] = ()
    sinks: Sequence[Sink] = ()
    stop_requested: Callable[[], bool] = lambda: False
    """Asked on this worker before every step; one worker's yes stops all after that step."""
    problem_with: Callable[[Sequence[Batch]], str | None] = lambda _: None
    """Asked on this worker about the batches of every step; what one worker says stops all."""
    stopped: bool = False
    unreadable: str | None = None
    """Why this worker's micro-batches cannot be read."""
    data_step: int = 0
    """Steps whose tickets have been drawn; differs from `position.step` where a resumed run was
    told to begin its data or its counters anew."""
    sources: Sequence[str] = ()
    """Names of what `source_id` numbers."""
    clock: Clock = field(default_factory=Clock)
    """Where this worker's time goes."""
    mfu_per_rate: float | None = None
    """Model FLOPs utilisation for one token a second, of all workers; None: not known."""
    on_worker: Callable[[dict[str, float]], None] = lambda _: None
    """Told this worker's own metrics, on every worker, whenever there are metrics of all."""
    on_spike: Callable[[Spike], None] = lambda _: None
    """Told on every worker of a step whose loss stands out, before its update."""
    left_out: Sequence[range] = ()
    """Steps whose batches are drawn and not trained on."""
    say: Callable[[str], None] = lambda _: None
    """Where a worker that is slow is named."""
    window: Window = field(default_factory=Window)
    source_sums: torch.Tensor = field(init=False)
    """Of this worker since the start, by source: tokens, cross-entropy, labels. [3, sources]"""

    def __post_init__(self) -> None:
        shape = (3, len(self.sources))
        self.source_sums = torch.zeros(shape, dtype=torch.float64, device=self.device)
        if self.settings.saliency_curriculum.enabled:
            track_columns(self.model)
        self.own_work, self.stragglers = OwnWork(self.model, self.device), Stragglers()

    def run(self, tickets: Tickets) -> Position:
        """Train until the stage's end, or until somebody asks to stop (then `stopped` is set)."""
        self.model.train()
        self.window = Window(before=self.source_sums.clone())
        with self.clock.during(PRODUCTIVE), self.own_work:
            while not (self.at_end or self.stopped):
                began = time.perf_counter()
                self.own_work.begin()
                with self.clock.during("data_wait"):
                    batches = self._draw(tickets)
                self.window.waited += time.perf_counter() - began
                self._step(batches)
                self.own_work.end()
                self._after()
        return self.position

    @property
    def at_end(self) -> bool:
        """Whether the last step is taken, or a plateau was reached."""
        position = self.position
        plateau = self.settings.early_stopping.enabled and position.ended is not None
        return plateau or position.step >= self.settings.total_steps

    def watch(self, loss: float) -> None:
        """Take note of a held-out loss, alike on all workers; at a plateau the stage ends, but not
        before its strength is what it will be."""
        stopping, position = self.settings.early_stopping, self.position
        last = self.settings.strength(self.settings.total_steps, position.initial_strength)
        if stopping.enabled and position.strength == last:
            position.plateau = stopping.watch(position.plateau, loss)
            position.ended = stopping.reason(position.plateau)

    # --------------------------------------------------------------------------------- a step

    def _draw(self, tickets: Tickets) -> list[tuple[int, Batch]]:
        """This worker's micro-batches of the next step; none if they cannot be read, of which all
        workers hear."""
        rank, size = world()
        deal = Deal(self.settings.gradient_accumulation_steps, size)
        wanted = deal.step(rank, self.data_step)
        try:
            drawn = [next(tickets) for _ in wanted]
        except UserError as error:
            self.unreadable = str(error)
            return []
        assert [ticket for ticket, _ in drawn] == wanted, f"the stream gave {drawn}, not {wanted}"
        self.data_step += 1
        return [(ticket, batch.to(self.device)) for ticket, batch in drawn]

    def _step(self, batches: list[tuple[int, Batch]]) -> None:
        settings, position = self.settings, self.position
        step, total = position.schedule_step, settings.total_steps
        torch.manual_seed(seed_of(settings.seed, self.stage, position.step, world()[0]))
        self._quantise(step, total)
        own = settings.optimizer.group_schedule.items()
        by_group = {name: schedule.factor(step, total) for name, schedule in own}
        set_learning_rates(self.optimizer, settings.schedule.factor(step, total), by_group)
        weights = settings.weights(step)
        passes = [p for ticket, batch in batches for p in self._passes(ticket, batch, weights)]
        counts = self._count([batch for _, batch in batches], passes, weights)
        self._note([batch for _, batch in batches], counts)
        if any(position.step in steps for steps in self.left_out):
            position.skipped += 1
        else:
            self._train(passes, counts, weights)
        position.step += 1
        position.schedule_step += 1

    def _train(
        self, passes: list[Pass], counts: dict[str, float], weights: dict[str, float]
    ) -> None:
        """Forward, backward and update of a step."""
        weights = self._balanced(passes, counts, weights)
        scales = {name: weight / max(counts[name], 1.0) for name, weight in weights.items()}
        if len(scales) > 1 and self.position.step % self.settings.grad_norms_every == 0:
            self.window.term_norms = self._gradient_norms(passes, scales)
        found = []
        for index, each in enumerate(passes):
            synchronize_gradients(self.model, on=index == len(passes) - 1)
            found.append(self._forward_backward(each, scales))
        self._watch_loss(found, scales)
        if self._update():
            self._add(found, counts, weights)

    def _watch_loss(self, found: list[Metrics], scales: dict[str, float]) -> None:
        """Tell of a loss that stands out from those before it."""
        given, position = self.settings.loss_spike, self.position
        if not given.enabled:
            return
        if position.schedule_step in self.settings.curriculum.ends(self.settings.total_steps):
            position.losses = Norms()  # a phase begins, whose objectives weigh otherwise
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        for metrics in found:
            for name, scale in scales.items():
                if f"{name}/sum" in metrics:
                    total += scale * metrics[f"{name}/sum"].double()
        loss = all_reduce_sums(total).item()
        if not math.isfinite(loss):  # nor is its gradient
            return
        usual = given.limit(position.losses, loss)
        if usual < loss:
            size = self.settings.gradient_accumulation_steps
            first = (self.data_step - 1) * size
            tickets = (first, first + size - 1)
            self.on_spike(Spike(position.step, loss, position.losses.mean, tickets))
        position.losses = given.watch(position.losses, usual)

    def _quantise(self, step: int, total: int) -> None:
        """Strength, salient columns and sparsity of a step."""
        settings, position = self.settings, self.position
        position.strength = settings.strength(step, position.initial_strength)
        set_strength(self.model, position.strength)
        saliency, sparsity = settings.saliency_curriculum, settings.activation_sparsity
        if saliency.enabled:
            if position.step and position.step % saliency.update_interval == 0:
                update_columns(self.model, saliency.ema_decay)
            set_saliency(self.model, saliency.k(step, total))
        if sparsity.enabled:
            block = sparsity.m if sparsity.mode == "block" else None
            set_sparsity(self.model, lambda size: sparsity.kept(size, step, total), block)

    def _passes(self, ticket: int, batch: Batch, weights: dict[str, float]) -> list[Pass]:
        """One forward per distinct view; who looks at the batch itself rides on a view that has it
        as its clean half."""
        objectives, views = self.settings.objectives, dict[str, Batch]()
        for name in weights:
            maker = getattr(objectives, name).view_of or name
            if maker not in views:
                generator = torch.Generator(self.device)
                generator.manual_seed(seed_of(self.settings.seed, self.stage, ticket, maker))
                views[maker] = getattr(objectives, maker).view(batch, generator)
        made = (view for view in views.values() if view is not batch and view.clean is not None)
        carrier = next(made, batch)
        passes: dict[int, Pass] = {}
        for name in weights:
            view = views[getattr(objectives, name).view_of or name]
            view = carrier if view is batch else view
            passes.setdefault(id(view), Pass(batch, view, [])).names.append(name)
        return list(passes.values())

    def _count(
        self, batches: list[Batch], passes: list[Pass], weights: dict[str, float]
    ) -> dict[str, float]:
        """Terms of every objective, real tokens, wishes to stop, own work: of all workers, in one
        reduce."""
        names = [*weights, "tokens", "stop", "problem"]
        rank, size = world()
        every = torch.zeros(len(names) + size, dtype=torch.float64, device=self.device)
        sums = every[: len(names)]
        for each in passes:
            for name in each.names:
                sums[names.index(name)] += getattr(self.settings.objectives, name).count(each.view)
        problem = self.unreadable or self.problem_with(batches)
        sums[-3] = sum(batch.real.sum() for batch in batches)
        sums[-2] = float(self.stop_requested())
        sums[-1] = float(problem is not None)
        every[len(names) + rank] = own = self.own_work.seconds()
        self.window.own += own
        reduced = all_reduce_sums(every).tolist()
        counts = dict(zip(names, reduced, strict=False))
        self._compare(reduced[len(names) :])
        if counts.pop("problem"):
            told = next(filter(None, all_gather_objects(problem)))
            raise Passing(f"{self.stage}, step {self.position.step}: {told}")
        if not any(counts[name] for name in weights):
            raise UserError(
                f"{self.stage}, step {self.position.step}: not one token to learn from in the "
                "whole global batch; every label is masked"
            )
        return counts

    def _compare(self, own_work: list[float]) -> None:
        """Name a worker that is slow."""
        slow = self.stragglers.note(own_work, self.own_work.step_seconds)
        if slow and world()[0] == 0:
            self.say(f"{self.stage:<9} step {self.position.step}: {slow}")

    def _balanced(
        self, passes: list[Pass], counts: dict[str, float], weights: dict[str, float]
    ) -> dict[str, float]:
        """Weights times the objectives' factors, of which some are measured when first needed: at
        full strength, for what is not quantised yet may not differ from its teacher at all."""
        factors = {}
        for name in weights:
            objective, known = getattr(self.settings.objectives, name), self.position.factors
            if objective.factor is None and name not in known:
                pair = {key: 1 / max(counts.get(key, 0.0), 1.0) for key in (_MEASURE, name)}
                set_strength(self.model, 1.0)
                known[name] = objective.grad_ratio * _ratio(
                    name, self._gradient_norms(passes, pair)
                )
                set_strength(self.model, self.position.strength)
            factors[name] = known[name] if objective.factor is None else objective.factor
        return {name: weight * factors[name] for name, weight in weights.items()}

    def _gradient_norms(self, passes: list[Pass], scales: dict[str, float]) -> dict[str, float]:
        """Norm of each term's own gradient over the whole global batch; costs a forward and a
        backward for each of them and leaves no trace."""
        norms = {}
        devices = [self.device] if self.device.type == "cuda" else []
        for name in scales:
            mine = [each._replace(names=[name]) for each in passes if name in each.names]
            with torch.random.fork_rng(devices):
                for index, each in enumerate(mine):
                    synchronize_gradients(self.model, on=index == len(mine) - 1)
                    self._forward(each, scales)[0].backward()
            norms[name] = clip_grad_norm(self.model.parameters(), None).item()
            self.model.zero_grad(set_to_none=True)
        return norms

    def _forward_backward(self, each: Pass, scales: dict[str, float]) -> Metrics:
        """Gradients of a pass; its sums."""
        loss, metrics = self._forward(each, scales)
        loss.backward()
        return metrics

    def _forward(self, each: Pass, scales: dict[str, float]) -> tuple[torch.Tensor, Metrics]:
        terms: dict[str, list[Term]] = defaultdict(list)
        needs_teacher = False
        for name in each.names:
            objective = getattr(self.settings.objectives, name)
            terms[objective.kind].append(Term(name, objective, scales[name]))
            needs_teacher |= objective.needs_teacher
        attention = next(iter(terms["attention"]), None)
        layer = attention.objective.layer if attention else None
        output = None
        if needs_teacher:
            assert self.teacher is not None, f"{each.names} need a teacher"
            output = self.teacher(each.clean, bool(terms["layer"]), layer)
        sources = len(self.sources) if "continue_pretrain" in each.names else 0
        with self.autocast:
            arguments = (terms["head"], terms["layer"], output, sources)
            return self.model(
                each.view, *arguments, attention=attention, router_terms=terms["router"]
            )

    def _update(self) -> bool:
        """Clip and step; a gradient that is not finite is counted and leaves everything alone.
        Whether it was finite, alike on all workers."""
        position = self.position
        limit = self.settings.max_grad_norm if self.settings.optimizer.enable_clipping else None
        norm = clip_grad_norm(self.model.parameters(), limit).item()
        if math.isfinite(norm):
            self._zclip(norm if limit is None else min(norm, limit))
            self.optimizer.step()
            position.skipped_in_a_row = 0
            self.window.sums["grad_norm"] += norm
        else:
            position.skipped += 1
            position.skipped_in_a_row += 1
            if position.skipped_in_a_row >= self.settings.max_skipped_steps:
                raise FloatingPointError(
                    f"{self.stage}, step {position.step}: the gradient was not finite for "
                    f"{position.skipped_in_a_row} steps in a row; lower the learning rate"
                )
        self.optimizer.zero_grad(set_to_none=True)
        return math.isfinite(norm)

    def _zclip(self, norm: float) -> None:
        """Clip once more a norm that stands out from those before it."""
        position, zclip = self.position, self.settings.zclip
        limit = zclip.limit(position.norms, norm)
        if limit < norm and self.settings.optimizer.enable_clipping:
            clip_grad_norm(self.model.parameters(), limit)
            self.window.sums["zclipped"] += 1
            norm = limit
        position.norms = zclip.watch(position.norms, norm)

    # --------------------------------------------------------------------------- after a step

    def _note(self, batches: list[Batch], counts: dict[str, float]) -> None:
        """What a step went through, whatever came of it."""
        for batch in batches if self.sources else ():
            tokens = batch.real.sum(1).double()
            self.source_sums[0].index_add_(0, batch.source_id, tokens)
        self.window.counts["tokens"] += counts["tokens"]
        self.window.steps += 1
        self.position.tokens += round(counts["tokens"])
        self.stopped = counts["stop"] > 0

    def _add(
        self, found: list[Metrics], counts: dict[str, float], weights: dict[str, float]
    ) -> None:
        """Losses of a step that was not skipped: one that is not finite would stay in every sum."""
        for metrics in found:
            if "by_source" in metrics:
                self.source_sums[1:] += metrics.pop("by_source")
            for key, value in metrics.items():
                self.window.sums[key] += value.double()
        for name, weight in weights.items():
            self.window.counts[name] += counts[name]
            self.window.counts[f"weight/{name}"] = weight
        self.window.updates += 1

    def _after(self) -> None:
        step = self.position.step
        if step % self.settings.log_every == 0 or self.at_end or self.stopped:
            self._log()
        for hook in self.hooks:
            if step % hook.period == 0 or self.at_end or self.stopped:
                with self.clock.during(hook.cause):
                    hook.fn(self)
        if self.window.steps and self.at_end:  # since an evaluation just now
            self._log()

    def _log(self) -> None:
        self.write(summary(self))
        self.on_worker(worker_metrics(self.window))
        self.window = Window(before=self.source_sums.clone())

    def write(self, metrics: dict[str, float]) -> None:
        """Metrics of the current step to every sink (of rank 0); every worker calls it."""
        on_rank_zero(lambda: write_all(self.sinks, self.stage, self.position.step, metrics))


def _ratio(name: str, norms: dict[str, float]) -> float:
    """Of the gradient of the cross-entropy to that of an objective."""
    reference, own = norms[_MEASURE], norms[name]
    if not (reference > 0 and own > 0 and math.isfinite(reference / own)):
        raise UserError(
            f"objectives.{name}: its factor cannot be measured, for its gradient has norm {own:g} "
            f"and that of {_MEASURE} {reference:g}; give a number instead of auto"
        )
    return reference / own


def autocast_for(device: torch.device, precision: str) -> torch.autocast:
    """bf16 autocast over fp32 masters on GPUs, plain fp32 on CPUs, unless said otherwise."""
    enabled = precision == "bf16" or (precision == "auto" and device.type == "cuda")
    return torch.autocast(device.type, torch.bfloat16, enabled=enabled)


def mean_loss(losses: Mapping[str, float]) -> float:
    """Mean over domains: what decides `best`."""
    return sum(losses.values()) / len(losses)

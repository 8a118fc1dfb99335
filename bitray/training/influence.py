"""Influence remixing: which sources help the probe domains, and the weights that follow from it.

At a decision the gradient of every probe domain's held-out rows is compared with gradients of a few
rows of every source (`gradients`), scored and turned into weights (`scores`). Who keeps the
weights is told by `on_decision`; nothing here knows of actors. See DATA, section 5.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float64

from bitray.data.mixture import TABLES
from bitray.data.tickets import decision_after
from bitray.data.weights import UNIT, quantise
from bitray.models.batch import Batch
from bitray.training.gradients import gram_matrix
from bitray.training.loop import Loop
from bitray.training.parallel import all_reduce_sums, world
from bitray.training.scores import (
    METHODS,
    Measured,
    ado,
    measured,
    moved,
    preferred,
    standing,
    surely_harmful,
)
from bitray.training.settings import InfluenceSettings

SPANS = 8
"""Parts of an interval whose mean losses ADO fits its laws to."""
Shares = Float64[np.ndarray, " sources"]
Losses = dict[str, list[tuple[float, float]]]
"""Of each source, tokens of the stage so far and its mean loss around there."""
Decide = Callable[[int, Mapping[str, float] | None, Mapping[str, Any]], None]
"""Takes the step, the new weights or None for no change, and notes for the journal."""


class Material(NamedTuple):
    """What influence is measured on."""

    probes: Mapping[str, Batch]
    """Held-out rows of each probe domain."""
    groups: Callable[[str, int], Sequence[Batch]]
    """Groups of training rows of a source for the n-th decision."""


@dataclass
class Influence:
    """The hook that decides, at the end of a step. Every worker runs it and comes to the same."""

    settings: InfluenceSettings
    interval: int
    material: Material
    weights: dict[str, float]
    """Current token shares of the sources that are remixed."""
    on_decision: Decide
    current: Callable[[int], Mapping[str, float]] | None = None
    """Asked for the weights that a decision of a step goes on from, which a curriculum may have
    switched; None: those of the last decision."""
    say: Callable[[str], None] = print
    score: dict[str, float] | None = None
    """Running mean of where each source stands among the others."""
    losses: Losses = field(default_factory=dict)
    prior: dict[str, float] = field(default_factory=dict)
    """The weights at the start, which `ado` prefers."""
    since: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.prior = self.prior or dict(self.weights)
        self.span = max(1, self.interval // SPANS)
        self._seen: torch.Tensor | None = None

    def __call__(self, loop: Loop) -> None:
        """Note losses; decide, if it is a step of decision."""
        if self.settings.method == "ado" and loop.data_step % self.span == 0:
            self._note_losses(loop)
        first, step = self.settings.first(self.interval), loop.data_step
        if decision_after(step - 1, first, self.interval) != step:
            return
        began = time.perf_counter()
        if self.current is not None:
            self.weights = dict(self.current(step))
        found = {} if self.settings.method == "ado" else self._measured(loop)
        optimal, notes = self._optimal(found)
        if optimal is not None:
            self.weights = self._moved(optimal)
        if self.score is not None:
            notes["standing"] = dict(self.score)
        self.on_decision(step, None if optimal is None else self.weights, notes)
        if "kept" in notes and world()[0] == 0:
            self.say(f"influence: weights stay as they are, {notes['kept']}")
        now = time.perf_counter()
        overhead = {"seconds": now - began, "overhead": (now - began) / (now - self.since)}
        self.since = now
        loop.write(
            {f"influence/{name}": value for name, value in self._logged(found)}
            | {f"influence/{name}": value for name, value in overhead.items()}
        )

    # ------------------------------------------------------------------------------ measuring

    def _measured(self, loop: Loop) -> dict[str, Measured]:
        """Scores of every method, from the same gradients; none if a gradient is not finite."""
        number = (loop.data_step - self.settings.first(self.interval)) // self.interval
        batches = [*self.material.probes.values()]
        for source in self.weights:
            batches += self.material.groups(source, number)
        gram = gram_matrix(loop, batches, self.settings.depth)
        if not np.isfinite(gram).all():
            return {}
        given = (len(self.material.probes), self.settings.groups, self.settings.lambda_val)
        return {method: measured(method, gram, *given) for method in METHODS}

    def _note_losses(self, loop: Loop) -> None:
        """One more point of every source's loss, over the steps since the last one."""
        sums = loop.source_sums - (0 if self._seen is None else self._seen)
        self._seen = loop.source_sums.clone()
        _, nll, labels = all_reduce_sums(sums).tolist()
        for name in self.weights:
            at = loop.sources.index(name)
            if labels[at]:
                point = (float(loop.position.tokens), nll[at] / labels[at])
                self.losses.setdefault(name, []).append(point)

    # ------------------------------------------------------------------------------- deciding

    def _optimal(self, found: Mapping[str, Measured]) -> tuple[Shares | None, dict[str, Any]]:
        """The mixture that is best by what was measured, or None and why there is none; with what
        the journal notes about it."""
        method, names = self.settings.method, list(self.weights)
        notes: dict[str, Any] = {"method": method}
        if method == "ado":
            optimal = ado(
                {name: self.losses.get(name, []) for name in names},
                np.array([self.prior[name] for name in names]),
                np.array(list(self.weights.values())),
            )
            if optimal is None:
                return None, notes | {"kept": "the sources' losses follow no law as yet"}
            return optimal, notes | {"optimal": dict(zip(names, optimal.tolist(), strict=True))}
        if not found:
            return None, notes | {"kept": "a gradient was not finite"}
        driving, shares = found[method], list(self._probe_weights().values())
        for title, values in zip(TABLES, (driving.score, driving.error), strict=True):
            notes[title] = self._table(values)
        stands = standing(driving, shares)
        if not stands.any():
            return None, notes | {"kept": "the sources differ by no more than their errors"}
        keep = self.settings.score_ema if self.score else 0.0
        before = self.score or dict.fromkeys(names, 0.0)
        self.score = {
            name: keep * before[name] + (1 - keep) * float(z)
            for name, z in zip(names, stands, strict=True)
        }
        score = np.array(list(self.score.values()))
        optimal = preferred(score, surely_harmful(driving, shares), self.settings.temperature)
        return optimal, notes

    def _moved(self, optimal: Shares) -> dict[str, float]:
        """Weights as the journal will have them."""
        bounds = (self.settings.min_weight, self.settings.max_weight)
        given = np.array(list(self.weights.values()))
        wanted = moved(given, optimal, self.settings.learning_rate, bounds)
        named = dict(zip(self.weights, wanted.tolist(), strict=True))
        parts = quantise(named, tuple(named), *bounds)
        return {name: part / UNIT for name, part in zip(named, parts, strict=True)}

    def _probe_weights(self) -> dict[str, float]:
        given = self.settings.probes
        return {name: given.get(name, 0.0) if given else 1.0 for name in self.material.probes}

    def _table(self, values: np.ndarray) -> dict[str, dict[str, float]]:
        rows = zip(self.material.probes, values.tolist(), strict=True)
        return {probe: dict(zip(self.weights, row, strict=True)) for probe, row in rows}

    # ----------------------------------------------------------------------- numbers and state

    def _logged(self, found: Mapping[str, Measured]) -> Iterator[tuple[str, float]]:
        for source, weight in self.weights.items():
            yield f"weight_{source}", weight
        for method, each in found.items():
            title = "score" if method == self.settings.method else method
            for probe, row in self._table(each.score).items():
                for source, value in row.items():
                    yield f"{title}_{probe}_{source}", value

    def state(self, loop: Loop) -> dict[str, Any]:
        """For a checkpoint, as JSON; every worker calls it, after what was due at this step."""
        partly: list[list[float]] = []
        if self.settings.method == "ado":
            seen = 0 if self._seen is None else self._seen
            partly = all_reduce_sums(loop.source_sums - seen).tolist()
        return {
            "weights": self.weights,
            "score": self.score,
            "losses": self.losses,
            "prior": self.prior,
            "partly": partly,
        }

    def resume(self, loop: Loop, held: Mapping[str, Any]) -> None:
        """Take over what `state` gave."""
        self.weights, self.score = dict(held["weights"]), held["score"]
        self.prior = dict(held["prior"])
        self.losses = {name: [(n, x) for n, x in seen] for name, seen in held["losses"].items()}
        self._seen = loop.source_sums.clone()
        if held["partly"] and world()[0] == 0:  # nobody knows any more whose part was whose
            self._seen -= torch.tensor(held["partly"], dtype=self._seen.dtype)

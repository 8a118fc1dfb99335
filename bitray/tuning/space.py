"""A search space: which settings of a run are tried, for what, at which cost.

Parameters are dotted paths into the run's configuration.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import yaml
from pydantic import Field, model_validator

from bitray.pipeline.config import Config
from bitray.settings import Composed, Settings, Tree, UserError, listed, nearest
from bitray.tuning import checks
from bitray.tuning.linear import Linear, at_most_zero, linear
from bitray.tuning.parameter import Number, Parameter, decoded, encoded, name_of


class StageBudget(Settings):
    """Length of a stage in every trial."""

    steps: int | None = Field(default=None, ge=1)
    tokens: int | None = Field(default=None, ge=1)

    @model_validator(mode="after")
    def _is_one(self) -> "StageBudget":
        if (self.steps is None) == (self.tokens is None):
            raise ValueError("give either steps or tokens")
        return self


class Scheduler(Settings):
    """Early stopping of trials."""

    type: Literal["asha", "none"] = "asha"
    grace: float = Field(default=0.25, gt=0, le=1)
    """Share of a trial's tokens that it may use in any case."""
    reduction_factor: float = Field(default=3.0, gt=1)
    """One of so many goes on at each rung."""


class SearchSpace(Composed):
    """What is searched. `load` checks all of it against the configuration of the run."""

    configs: ClassVar[Path] = Path("no groups")
    default_groups: ClassVar[dict[str, str]] = {}

    run: dict[str, Any] = {}
    """The configuration that all trials share, as in a `--config` file."""
    parameters: dict[str, Parameter] = Field(min_length=1)
    constraints: tuple[str, ...] = ()
    """Linear: `a.b + 0.5 * c.d <= 1`; of two rates `a.lr <= b.lr` or `log10(a.lr) + ... >= -5`."""
    objectives: dict[str, Literal["minimize", "maximize"]] = Field(min_length=1)
    outcome_constraints: tuple[str, ...] = ()
    """`peak_memory_gb <= 20`; of several objectives also what is worst to be had for the front."""
    start: tuple[dict[str, Any], ...] = ()
    """Points that are tried before all others."""
    num_trials: int = Field(default=30, ge=1)
    max_concurrent: int | None = Field(default=None, ge=1)
    """None: as many as the cluster holds."""
    sobol_trials: int = Field(default=12, ge=2)
    """So many points are spread evenly (those of `start` count), the others chosen by a model."""
    scheduler: Scheduler = Scheduler()
    budget: dict[str, StageBudget] = {}
    seed: int = 0
    keep_checkpoints: bool = False
    """Of trials, after their end; the best configuration is trained again without them."""

    @classmethod
    def load(cls, path: str | None = None, overrides: Sequence[str] = ()) -> "SearchSpace":
        """The space of a YAML file. Words are of the space (`num_trials=50`) or of the run.

        `UserError` tells of all that is wrong with it, for itself and against the run.
        """
        if path is None:
            raise UserError("give the YAML file of a search space")
        if not Path(path).is_file():
            siblings = [p.name for p in Path(path).parent.glob("*.y*ml")]
            raise UserError(f"{path}: no such file{nearest(Path(path).name, siblings)}")
        own = [word for word in overrides if re.split(r"[.=]", word)[0] in cls.model_fields]
        space = super().load(path, own)
        space._words = [word for word in overrides if word not in own]
        found = checks.against(space, space.config())
        if found:
            raise UserError(listed(found))
        return space

    _words: list[str] = []

    def config(self) -> Config:
        """The configuration that trials vary: `run`, budgets, then the command line."""
        lines = {
            path[1:]: line
            for layer in self._layers
            for path, line in layer.lines.items()
            if path[0] == "run" and path[1:]
        }
        origin = self._layers[0].origin if self._layers else "the search space"
        file, said = Config.layer(origin, self.run, lines), Config.spoken(self._words)
        base = Config.compose([file, said])
        found = [
            f"budget.{name}: the run has no such stage{nearest(name, base.stages)}; "
            f"it has: {', '.join(base.stages)}"
            for name in self.budget
            if name not in base.stages
        ]
        if found:
            raise UserError(listed(found))
        # Budgets are of the stages that the words chose; what else these say is stronger.
        layers = base.override(self._lengths())._layers
        return Config.compose([*layers, replace(said, groups=None)])

    def _lengths(self) -> Tree:
        return {
            f"stages.{stage}.max_steps" if budget.steps else f"stages.{stage}.total_tokens": (
                budget.steps or budget.tokens
            )
            for stage, budget in self.budget.items()
        }

    def dump(self) -> str:
        """YAML of this very space: budgets and words are part of its run."""
        told = self.model_dump(mode="json", exclude_unset=True, exclude={"run", "budget"})
        told["run"] = self.config().spelled()
        return yaml.safe_dump(told, sort_keys=False, allow_unicode=True)

    # ------------------------------------------------------------------------------- points

    def searched(self) -> dict[str, Parameter]:
        """What Ax decides about, by path."""
        return {path: p for path, p in self.parameters.items() if p.searched}

    def active(self, path: str, values: Mapping[str, Any]) -> bool:
        """Whether a parameter matters, given those before it."""
        condition = self.parameters[path].condition
        return condition is None or values.get(condition[0], ...) in condition[1]

    def overrides(self, point: Mapping[str, Any]) -> dict[str, Any]:
        """Settings of the run, by path, for a point in Ax's names and scales."""
        found: dict[str, Any] = {}
        for path, parameter in self.parents_first():
            if not self.active(path, found):
                continue
            if parameter.kind == "fixed":
                found[path] = parameter.fixed
            elif parameter.derived:
                found[path] = self._derived(parameter.derived, found)
            else:
                found[path] = decoded(parameter, point[self.name(path, found)])
        return {path: found[path] for path in self.parameters if path in found}

    def _derived(self, text: str, values: Mapping[str, Any]) -> float:
        """Of an expression, within what constraints allow: Ax keeps them to some 1e-8."""
        said = linear(text)
        low, high = self.extremes(said) or (-math.inf, math.inf)
        return min(max(said.value(values), low), high)

    def point(self, overrides: Mapping[str, Any]) -> dict[str, Any]:
        """The point in Ax's names and scales for settings of the run."""
        return {
            self.name(path, overrides): encoded(parameter, overrides[path])
            for path, parameter in self.searched().items()
            if self.active(path, overrides)
        }

    def name(self, path: str, values: Mapping[str, Any]) -> str:
        """Of a parameter in Ax, given those before it. Parameters are a tree there, so that what
        matters with several values of another one has a name for each of them."""
        branch, above = "", self.parameters[path].condition
        while above is not None:
            parent, said = above
            branch = (f".{values[parent]}" if len(said) > 1 else "") + branch
            above = self.parameters[parent].condition
        return name_of(path + branch)

    def states(self, path: str) -> Iterator[dict[str, Any]]:
        """All values of those before a parameter with which it matters."""
        condition = self.parameters[path].condition
        if condition is None:
            yield {}
            return
        parent, said = condition
        for state in self.states(parent):
            yield from ({**state, parent: value} for value in said)

    def names(self, path: str) -> set[str]:
        """All that a parameter has in Ax."""
        return {self.name(path, state) for state in self.states(path)}

    def parents_first(self) -> Iterator[tuple[str, Parameter]]:
        """All parameters, each after those that it depends on."""

        def rank(path: str) -> tuple[bool, int]:
            return self.parameters[path].derived is not None, len(self.above(path))

        for path in sorted(self.parameters, key=rank):
            yield path, self.parameters[path]

    def above(self, path: str) -> list[str]:
        """Parameters that decide whether one matters; nearest first."""
        found: list[str] = []
        while path in self.parameters and (said := self.parameters[path].condition):
            path = said[0]
            if path in found:
                raise UserError(f"parameters.{path}: when: it depends on itself")
            found.append(path)
        return found

    def size(self) -> Number:
        """How many points there are, whatever constraints forbid; without end in an interval."""
        known = self.searched()

        def below(path: str, value: Any) -> Iterator[str]:
            for child, each in known.items():
                if each.condition and each.condition[0] == path and value in each.condition[1]:
                    yield child

        def points(path: str) -> Number:
            parameter = known[path]
            if parameter.bounds:
                return parameter.int[1] - parameter.int[0] + 1 if parameter.int else math.inf
            return sum(math.prod(map(points, below(path, each))) for each in parameter.values)

        return math.prod(points(path) for path, each in known.items() if not each.when)

    def inequalities(self) -> list[tuple[dict[str, float], float]]:
        """Constraints as `sum(coefficient * x) <= bound`, in paths and in the scales of Ax."""
        return [self.inequality(text) for text in self.constraints]

    def inequality(self, text: str) -> tuple[dict[str, float], float]:
        """A constraint as `inequalities` gives them; `ValueError` where it is none."""
        said = at_most_zero(text)
        self.check_numbers(text, said)
        logs = {path for path in said.paths if self.parameters[path].loguniform}
        wrong = next((path for path in said.logs if path not in logs), None)
        if wrong:
            raise ValueError(f"'{text}': {wrong} is not loguniform; leave log10 out")
        bare = [path for path in said.terms if path in logs]
        if not bare:
            return {**said.terms, **said.logs}, -said.constant
        (first, a), (second, b) = (*said.terms.items(), ("", 0.0), ("", 0.0))[:2]
        if len(said.terms) != 2 or len(bare) != 2 or said.logs or said.constant or a * b >= 0:
            raise ValueError(
                f"'{text}' is not linear in the logarithm in which {bare[0]} is searched; compare "
                f"two rates (a <= 2 * b), write log10({bare[0]}), or make it uniform"
            )
        less, more = (first, second) if a > 0 else (second, first)  # |a| less <= |b| more
        ratio = abs(said.terms[more] / said.terms[less])
        return {less: 1.0, more: -1.0}, math.log10(ratio)

    def check_numbers(self, text: str, said: Linear) -> None:
        """`ValueError` where an expression speaks of what cannot be in a sum."""
        for path in said.paths:
            parameter = self.parameters.get(path)
            if parameter is None:
                raise ValueError(
                    f"'{text}': {path} is no parameter{nearest(path, self.parameters)}"
                )
            if parameter.bounds is None:
                raise ValueError(
                    f"'{text}': {path} is {parameter.kind}; only uniform, loguniform and int "
                    "parameters can be in a sum"
                )
            if parameter.when:
                raise ValueError(f"'{text}': {path} matters only sometimes (when)")

    def metrics(self) -> list[str]:
        """All that a trial has to report."""
        said = [name for text in self.outcome_constraints for name in at_most_zero(text).terms]
        return list(dict.fromkeys([*self.objectives, *said]))

    def allows(self, metrics: Mapping[str, float]) -> bool:
        """Whether what a trial reported keeps the outcome constraints."""
        return all(at_most_zero(text).value(metrics) <= 0 for text in self.outcome_constraints)

    def extremes(self, of: Linear) -> tuple[float, float] | None:
        """Least and largest value of an expression where all constraints hold; None: nowhere. Rates
        count as if none spoke of them: constraints are linear in their logarithms."""
        import numpy as np
        from scipy.optimize import linprog

        numbers = {p: each for p, each in self.searched().items() if each.bounds}
        if not numbers:
            return of.constant, of.constant
        bounds = [tuple(encoded(each, b) for b in each.bounds or ()) for each in numbers.values()]
        rows = self.inequalities()
        limits: dict[str, Any] = {"bounds": bounds}
        if rows:
            limits["A_ub"] = np.array([[row.get(p, 0.0) for p in numbers] for row, _ in rows])
            limits["b_ub"] = np.array([bound for _, bound in rows])
        rates = {p: each.loguniform for p, each in numbers.items() if each.loguniform}
        cost = np.array([0.0 if p in rates else of.terms.get(p, 0.0) for p in numbers])
        least, most = linprog(cost, **limits), linprog(-cost, **limits)
        if not (least.success and most.success):
            return None
        ends = [sorted(of.terms.get(p, 0.0) * bound for bound in rates[p]) for p in rates]
        low = least.fun + of.constant + sum(end[0] for end in ends)
        high = -most.fun + of.constant + sum(end[1] for end in ends)
        return round(low, 12) + 0.0, round(high, 12) + 0.0

    # ------------------------------------------------------------------------------- checks

    def problems(self) -> list[str]:
        """What is wrong with the space for itself."""
        return checks.problems(self)

    def line_of(self, path: str) -> str:
        """Where a parameter stands in the file, to be said behind a sentence; else nothing."""
        for layer in self._layers:
            if ("parameters", path) in layer.lines:
                return f" ({layer.origin}, line {layer.lines['parameters', path]})"
        return ""

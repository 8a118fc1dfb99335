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
from bitray.tuning.linear import Linear, at_most_zero, linear
from bitray.tuning.parameter import Number, Parameter, decoded, encoded, holds, name_of
from bitray.tuning.stages import ends_early, idle, trained

METRICS = {
    "loss": "held-out cross-entropy at strength 1 after the last stage, mean over domains, in nats",
    "loss_drop": "nats by which training lowers the loss of the model rounded without any",
    "tokens": "tokens trained on, over all stages of the trial",
    "steps": "optimizer steps, over all stages of the trial",
    "seconds": "seconds of steps, data and influence; not of start-up, evaluation and checkpoints",
    "tokens_per_second": "tokens over seconds",
    "peak_memory_gb": "most memory that a worker took",
    "tokens_per_second_per_gb": "tokens_per_second over peak_memory_gb",
    "loss_drop_per_second_per_gb": "loss_drop over seconds and peak_memory_gb",
}
"""What every trial reports, and thus what can be an objective."""


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
        found = space.against(space.config())
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
            return self.parameters[path].derived is not None, len(self._above(path))

        for path in sorted(self.parameters, key=rank):
            yield path, self.parameters[path]

    def _above(self, path: str) -> list[str]:
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
        return [self._inequality(text) for text in self.constraints]

    def _inequality(self, text: str) -> tuple[dict[str, float], float]:
        said = at_most_zero(text)
        self._check_numbers(text, said)
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

    def _check_numbers(self, text: str, said: Linear) -> None:
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

    # ------------------------------------------------------------------------------- checks

    def problems(self) -> list[str]:
        """What is wrong with the space for itself."""
        found = [text for path in self.parameters for text in self._parameter_problems(path)]
        for n, text in enumerate(self.constraints):
            found += [f"constraints.{n}: {problem}" for problem in _refused(self._inequality, text)]
        if not found:
            found += [*self._twins(), *self._region_problems(), *self._count_problems()]
        return [*found, *self._outcome_problems(), *self._size_problems()]

    def _parameter_problems(self, path: str) -> list[str]:
        parameter, where = self.parameters[path], f"parameters.{path}"
        found = []
        if parameter.condition:
            above, values = parameter.condition
            known = {p: each for p, each in self.parameters.items() if each.values}
            if above not in known:
                found.append(
                    f"{where}.when: {above} is no choice or ordered parameter"
                    f"{nearest(above, known)}"
                )
            else:
                found += [
                    f"{where}.when: {value!r} is none of the values of {above}: "
                    + ", ".join(map(repr, known[above].values))
                    for value in values
                    if not any(value is v or repr(value) == repr(v) for v in known[above].values)
                ]
            found += _refused(self._above, path)
        if parameter.derived is not None:
            problems = _refused(linear, parameter.derived)
            if not problems:
                said = linear(parameter.derived)
                problems = _refused(lambda text: self._check_numbers(text, said), parameter.derived)
                if said.logs:
                    problems.append("log10 has no place in a derived parameter")
            found += [f"{where}.derived: {problem}" for problem in problems]
        return found

    def _twins(self) -> list[str]:
        known: dict[str, str] = {}
        return [
            f"parameters.{path}: Ax cannot tell it from {known[name]}"
            for path in self.parameters
            for name in self.names(path)
            if known.setdefault(name, path) != path
        ]

    def _region_problems(self) -> list[str]:
        """Whether constraints leave anything."""
        if self.constraints and self.extremes(Linear({}, {}, 0.0)) is None:
            return ["constraints: no point of the space satisfies all of them"]
        return []

    def _count_problems(self) -> list[str]:
        """Ax would look for a further point without end."""
        size = self.size() if self.searched() else math.inf
        if size >= self.num_trials:
            return []
        return [f"num_trials: {self.num_trials} is more than the {size} points of the space"]

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

    def _outcome_problems(self) -> list[str]:
        found = []
        for n, text in enumerate(self.outcome_constraints):
            problems = _refused(at_most_zero, text)
            if not problems:
                said = at_most_zero(text)
                if said.logs or not said.terms:
                    problems.append(f"'{text}' speaks of no metric; write peak_memory_gb <= 20")
                own = [name for name in said.terms if name in self.objectives]
                if own and len(self.objectives) == 1:
                    problems.append(f"'{text}': {own[0]} is the objective itself")
            found += [f"outcome_constraints.{n}: {problem}" for problem in problems]
        return found

    def _size_problems(self) -> list[str]:
        dimensions, first = len(self.searched()), len(self.start)
        found = []
        if not dimensions:
            found.append("parameters: all are fixed, so there is nothing to search")
        if self.sobol_trials > self.num_trials:
            found.append(
                f"sobol_trials: {self.sobol_trials} is more than num_trials {self.num_trials}"
            )
        if max(first, dimensions) > self.num_trials:
            said = (
                f"{first} points to start from"
                if first > dimensions
                else f"{dimensions} parameters"
            )
            found.append(f"num_trials: {self.num_trials} is too few for {said}")
        for path, parameter in self.searched().items():
            stage, _, length = path.removeprefix("stages.").partition(".")
            budget = self.budget.get(stage)
            kind = {"max_steps": "steps", "total_tokens": "tokens"}.get(length)
            if budget is None or kind is None or not path.startswith("stages."):
                continue
            limit, most = getattr(budget, kind), max(parameter.bounds or parameter.values)
            if limit is None or most > limit:
                told = f"{limit:,} {kind}" if limit else f"{budget.tokens or budget.steps:,}"
                found.append(f"parameters.{path}: {most:,} is more than budget.{stage}, {told}")
        return found

    def against(self, config: Config) -> list[str]:
        """What is wrong with the space for this run: paths, types, bounds, metrics, points."""
        if not trained(config):
            return ["run: no stage trains a ternary model, so there is nothing to search"]
        metrics = [f"objectives.{name}" for name in self.objectives]
        for n, text in enumerate(self.outcome_constraints):
            metrics += [f"outcome_constraints.{n}.{name}" for name in at_most_zero(text).terms]
        found = [
            f"{where}: no trial reports {name}{nearest(name, METRICS)}; they report: "
            + ", ".join(METRICS)
            for where in metrics
            if (name := where.rsplit(".", 1)[-1]) not in METRICS
        ]
        found += ends_early(config)
        for path in self.parameters:
            found += self._told(path, config)
        if not found:
            found += self._start_problems(config)
        return list(dict.fromkeys(found))

    def _told(self, path: str, config: Config) -> list[str]:
        """The first mistake that the run's configuration finds in a parameter."""
        missing = _missing_entry(config, path) or idle(path, config)
        if missing:
            return [f"{missing}{self._line(path)}"]
        parameter = self.parameters[path]
        values: Sequence[Any] = parameter.tried()
        if parameter.derived is not None:
            values = self.extremes(linear(parameter.derived)) or ()
        for state in self.states(path):
            for value in values:
                try:
                    run = config.override({**state, path: value})
                except UserError as error:
                    return [f"{error}{self._line(path)}"]
                if early := ends_early(run):
                    return early
        return []

    def _line(self, path: str) -> str:
        for layer in self._layers:
            if ("parameters", path) in layer.lines:
                return f" ({layer.origin}, line {layer.lines['parameters', path]})"
        return ""

    def _start_problems(self, config: Config) -> list[str]:
        found = []
        for n, point in enumerate(self.start):
            where = f"start.{n}"
            strange = [path for path in point if path not in self.searched()]
            found += [
                f"{where}: {path} is not searched{nearest(path, self.searched())}"
                for path in strange
            ]
            lacking = [p for p in self.searched() if self.active(p, point) and p not in point]
            found += [f"{where}: {path} has to be given" for path in lacking]
            if strange or lacking:
                continue
            found += [
                f"{where}.{path}: {value!r} lies outside of the space"
                for path, value in point.items()
                if self.active(path, point) and not holds(self.parameters[path], value)
            ]
            found += [f"{where}: {problem}" for problem in _refused(config.override, point)]
        return found


def _refused(function: Any, argument: Any) -> list[str]:
    try:
        function(argument)
    except ValueError as error:
        return [str(error)]
    return []


def _missing_entry(config: Config, path: str) -> str | None:
    """What is wrong where a path names an entry, such as a source, that the run does not have."""
    node: Any = config
    for n, part in enumerate(parts := path.split(".")):
        if isinstance(node, Mapping):
            if part not in node:
                where = ".".join(parts[: n + 1])
                return (
                    f"{where}: the run has none of this name{nearest(part, node)}; there are: "
                    + (", ".join(node) or "none")
                )
            node = node[part]
        elif part in getattr(type(node), "model_fields", {}):
            node = getattr(node, part)
        else:
            return None
    return None

"""What is wrong with a search space: for itself, and against the run whose settings it searches."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bitray.pipeline.config import Config
from bitray.settings import UserError, nearest
from bitray.tuning.linear import Linear, at_most_zero, linear
from bitray.tuning.parameter import holds
from bitray.tuning.stages import ends_early, idle, trained

if TYPE_CHECKING:
    from bitray.tuning.space import SearchSpace

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


def problems(space: "SearchSpace") -> list[str]:
    """What is wrong with the space for itself."""
    found = [text for path in space.parameters for text in _parameter_problems(space, path)]
    for n, text in enumerate(space.constraints):
        found += [f"constraints.{n}: {problem}" for problem in _refused(space.inequality, text)]
    if not found:
        found += [*_twins(space), *_region_problems(space), *_count_problems(space)]
    return [*found, *_outcome_problems(space), *_size_problems(space)]


def _parameter_problems(space: "SearchSpace", path: str) -> list[str]:
    parameter, where = space.parameters[path], f"parameters.{path}"
    found = []
    if parameter.condition:
        above, values = parameter.condition
        known = {p: each for p, each in space.parameters.items() if each.values}
        if above not in known:
            found.append(
                f"{where}.when: {above} is no choice or ordered parameter{nearest(above, known)}"
            )
        else:
            found += [
                f"{where}.when: {value!r} is none of the values of {above}: "
                + ", ".join(map(repr, known[above].values))
                for value in values
                if not any(value is v or repr(value) == repr(v) for v in known[above].values)
            ]
        found += _refused(space.above, path)
    if parameter.derived is not None:
        wrong = _refused(linear, parameter.derived)
        if not wrong:
            said = linear(parameter.derived)
            wrong = _refused(lambda text: space.check_numbers(text, said), parameter.derived)
            if said.logs:
                wrong.append("log10 has no place in a derived parameter")
        found += [f"{where}.derived: {problem}" for problem in wrong]
    return found


def _twins(space: "SearchSpace") -> list[str]:
    known: dict[str, str] = {}
    return [
        f"parameters.{path}: Ax cannot tell it from {known[name]}"
        for path in space.parameters
        for name in space.names(path)
        if known.setdefault(name, path) != path
    ]


def _region_problems(space: "SearchSpace") -> list[str]:
    """Whether constraints leave anything."""
    if space.constraints and space.extremes(Linear({}, {}, 0.0)) is None:
        return ["constraints: no point of the space satisfies all of them"]
    return []


def _count_problems(space: "SearchSpace") -> list[str]:
    """Ax would look for a further point without end."""
    size = space.size() if space.searched() else math.inf
    if size >= space.num_trials:
        return []
    return [f"num_trials: {space.num_trials} is more than the {size} points of the space"]


def _outcome_problems(space: "SearchSpace") -> list[str]:
    found = []
    for n, text in enumerate(space.outcome_constraints):
        problems = _refused(at_most_zero, text)
        if not problems:
            said = at_most_zero(text)
            if said.logs or not said.terms:
                problems.append(f"'{text}' speaks of no metric; write peak_memory_gb <= 20")
            own = [name for name in said.terms if name in space.objectives]
            if own and len(space.objectives) == 1:
                problems.append(f"'{text}': {own[0]} is the objective itself")
        found += [f"outcome_constraints.{n}: {problem}" for problem in problems]
    return found


def _size_problems(space: "SearchSpace") -> list[str]:
    dimensions, first = len(space.searched()), len(space.start)
    found = []
    if not dimensions:
        found.append("parameters: all are fixed, so there is nothing to search")
    if space.sobol_trials > space.num_trials:
        found.append(
            f"sobol_trials: {space.sobol_trials} is more than num_trials {space.num_trials}"
        )
    if max(first, dimensions) > space.num_trials:
        said = f"{first} points to start from" if first > dimensions else f"{dimensions} parameters"
        found.append(f"num_trials: {space.num_trials} is too few for {said}")
    for path, parameter in space.searched().items():
        stage, _, length = path.removeprefix("stages.").partition(".")
        budget = space.budget.get(stage)
        kind = {"max_steps": "steps", "total_tokens": "tokens"}.get(length)
        if budget is None or kind is None or not path.startswith("stages."):
            continue
        limit, most = getattr(budget, kind), max(parameter.bounds or parameter.values)
        if limit is None or most > limit:
            told = f"{limit:,} {kind}" if limit else f"{budget.tokens or budget.steps:,}"
            found.append(f"parameters.{path}: {most:,} is more than budget.{stage}, {told}")
    return found


def against(space: "SearchSpace", config: Config) -> list[str]:
    """What is wrong with the space for this run: paths, types, bounds, metrics, points."""
    if not trained(config):
        return ["run: no stage trains a ternary model, so there is nothing to search"]
    metrics = [f"objectives.{name}" for name in space.objectives]
    for n, text in enumerate(space.outcome_constraints):
        metrics += [f"outcome_constraints.{n}.{name}" for name in at_most_zero(text).terms]
    found = [
        f"{where}: no trial reports {name}{nearest(name, METRICS)}; they report: "
        + ", ".join(METRICS)
        for where in metrics
        if (name := where.rsplit(".", 1)[-1]) not in METRICS
    ]
    found += ends_early(config)
    for path in space.parameters:
        found += _told(space, path, config)
    if not found:
        found += _start_problems(space, config)
    return list(dict.fromkeys(found))


def _told(space: "SearchSpace", path: str, config: Config) -> list[str]:
    """The first mistake that the run's configuration finds in a parameter."""
    missing = _missing_entry(config, path) or idle(path, config)
    if missing:
        return [f"{missing}{space.line_of(path)}"]
    parameter = space.parameters[path]
    values: Sequence[Any] = parameter.tried()
    if parameter.derived is not None:
        values = space.extremes(linear(parameter.derived)) or ()
    for state in space.states(path):
        for value in values:
            try:
                run = config.override({**state, path: value})
            except UserError as error:
                return [f"{error}{space.line_of(path)}"]
            if early := ends_early(run):
                return early
    return []


def _start_problems(space: "SearchSpace", config: Config) -> list[str]:
    found = []
    for n, point in enumerate(space.start):
        where = f"start.{n}"
        strange = [path for path in point if path not in space.searched()]
        found += [
            f"{where}: {path} is not searched{nearest(path, space.searched())}" for path in strange
        ]
        lacking = [p for p in space.searched() if space.active(p, point) and p not in point]
        found += [f"{where}: {path} has to be given" for path in lacking]
        if strange or lacking:
            continue
        found += [
            f"{where}.{path}: {value!r} lies outside of the space"
            for path, value in point.items()
            if space.active(path, point) and not holds(space.parameters[path], value)
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

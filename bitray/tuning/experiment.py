"""A search space as an experiment of Ax. Nothing of Tune, no threads."""

import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ax.api.client import Client
from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig
from ax.utils.common.random import with_rng_seed

from bitray.scratch import Scratch
from bitray.tuning.linear import Linear, at_most_zero
from bitray.tuning.parameter import encoded, mixed, name_of
from bitray.tuning.space import SearchSpace

LEAST_OBSERVED, OBSERVED_PER_PARAMETER = 5, 2
"""Trials that a surrogate takes before its sensitivities are told: fewer fit anything."""
TYPES: dict[type, Any] = {bool: "bool", int: "int", float: "float", str: "str"}


def _quiet() -> None:
    """Have Ax speak of problems alone. Its own way trips over other threads' new loggers."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] == "ax":
            logging.getLogger(name).setLevel(logging.WARNING)


def client_of(space: SearchSpace) -> Client:
    """A new experiment: parameters, constraints, objectives, and how candidates are made."""
    _quiet()
    client = Client()
    client.configure_experiment(
        [
            _parameter(space, path, state)
            for path in space.searched()
            for state in space.states(path)
        ],
        [
            " + ".join(f"{c!r} * {name_of(path)}" for path, c in row.items()) + f" <= {bound!r}"
            for row, bound in space.inequalities()
        ],
    )
    signs = {"minimize": "-", "maximize": ""}
    client.configure_optimization(
        ", ".join(f"{signs[how]}{name}" for name, how in space.objectives.items()),
        [_outcome(at_most_zero(text)) for text in space.outcome_constraints],
    )
    client.configure_generation_strategy(
        initialization_budget=space.sobol_trials,
        initialization_random_seed=space.seed,
        initialize_with_center=False,
        # Stopped and failed trials are no observations: rather more Sobol points than none at all.
        min_observed_initialization_trials=max(2, space.sobol_trials // 3),
        allow_exceeding_initialization_budget=True,
    )
    return client


def candidate(client: Client, space: SearchSpace, number: int) -> tuple[int, dict[str, Any]]:
    """Index and settings of the next trial, which is the `number`-th one made."""
    if number < len(space.start):
        point = space.point(space.start[number])
        return client.attach_trial(point), space.overrides(point)
    with with_rng_seed(space.seed):
        [(index, parameters)] = client.get_next_trials(1).items()
    return index, space.overrides(parameters)


def as_json(client: Client) -> str:
    """All of Ax's state."""
    with Scratch() as folder:
        path = Path(folder) / "ax.json"
        client.save_to_json_file(str(path))
        return path.read_text()


def from_json(text: str) -> Client:
    """The client that `as_json` was given."""
    _quiet()
    with Scratch() as folder:
        path = Path(folder) / "ax.json"
        path.write_text(text)
        return Client.load_from_json_file(str(path))


def importance(
    state: str, space: SearchSpace, observed: int
) -> tuple[dict[str, dict[str, float]], str]:
    """What each objective depends on, by a surrogate of the `observed` trials in Ax's state.

    Objective -> path -> total-order Sobol index as a share of their sum, negative where a larger
    value makes the objective smaller (Sobol 2001; the sign is the mean gradient's). And a sentence
    on how far to trust them: R2 of the surrogate at trials left out one by one. Trials that were
    stopped early count with what they reported last. No shares where there are too few trials.
    """
    from ax.analysis.plotly.cross_validation import CrossValidationPlot
    from ax.analysis.plotly.sensitivity import SensitivityAnalysisPlot

    needed = max(LEAST_OBSERVED, OBSERVED_PER_PARAMETER * len(space.searched()))
    if observed < needed:
        return {}, f"importance of parameters: too few trials, {observed} of the {needed} it takes"
    client = from_json(state)
    # Its own strategy may not have come to a surrogate yet: this one begins with it.
    client.configure_generation_strategy(initialization_budget=0, initialize_with_center=False)
    shares, fits = {}, []
    for name in space.objectives:
        with with_rng_seed(space.seed):
            indices, left_out = client.compute_analyses(
                [SensitivityAnalysisPlot(name), CrossValidationPlot([name])], display=False
            )
        table = _table(indices)
        found = dict(zip(table["parameter_name"], map(float, table["sensitivity"]), strict=True))
        shares[name] = {path: _share(found, space.names(path)) for path in space.searched()}
        fits.append(f"{_r2(_table(left_out)):.2f} for {name}")
    told = ", ".join(fits)
    return shares, f"importance is that of a surrogate whose R2 at trials left out is {told}"


def _share(found: Mapping[str, float], names: set[str]) -> float:
    """Of a parameter, under all its names; the surrogate sees a choice as a column for each
    value."""
    own = [share for column, share in found.items() if column.partition("_OH_")[0] in names]
    return math.copysign(math.fsum(map(abs, own)), math.fsum(own))


def _table(card: Any) -> Any:
    return next(iter(card.flatten())).df


def _r2(table: Any) -> float:
    rest = ((table["observed"] - table["predicted"]) ** 2).sum()
    return float(1 - rest / ((table["observed"] - table["observed"].mean()) ** 2).sum())


def _parameter(
    space: SearchSpace, path: str, state: Mapping[str, Any]
) -> RangeParameterConfig | ChoiceParameterConfig:
    """With the name that it has where those before it have these values."""
    parameter, name = space.parameters[path], space.name(path, state)
    if parameter.bounds:
        low, high = (encoded(parameter, bound) for bound in parameter.bounds)
        kind: Any = "int" if parameter.int else "float"
        return RangeParameterConfig(name, (low, high), kind)
    values: Any = [encoded(parameter, value) for value in parameter.values]
    below: dict[Any, list[str]] = {}
    for child, each in space.searched().items():
        if each.condition and each.condition[0] == path:
            for value in each.condition[1]:
                there = space.name(child, {**state, path: value})
                below.setdefault(encoded(parameter, value), []).append(there)
    return ChoiceParameterConfig(
        name,
        values,
        TYPES[str if mixed(parameter) else type(parameter.values[0])],
        is_ordered=parameter.kind == "ordered",
        dependent_parameters=below or None,
    )


def _outcome(said: Linear) -> str:
    """A constraint on metrics as Ax reads it: metrics on the left, a number on the right."""
    if len(said.terms) == 1:
        [(name, factor)] = said.terms.items()
        return f"{name} {'<=' if factor > 0 else '>='} {-said.constant / factor!r}"
    return " + ".join(f"{c!r} * {m}" for m, c in said.terms.items()) + f" <= {-said.constant!r}"

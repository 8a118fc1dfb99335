"""A search space as an experiment of Ax. Nothing of Tune, no threads."""

import logging
import tempfile
from pathlib import Path
from typing import Any

from ax.api.client import Client
from ax.api.configs import ChoiceParameterConfig, RangeParameterConfig
from ax.utils.common.logger import set_ax_logger_levels
from ax.utils.common.random import with_rng_seed

from bitray.tuning.linear import Linear, at_most_zero
from bitray.tuning.parameter import Parameter, encoded, mixed, name_of
from bitray.tuning.space import SearchSpace

TYPES: dict[type, Any] = {bool: "bool", int: "int", float: "float", str: "str"}


def client_of(space: SearchSpace) -> Client:
    """A new experiment: parameters, constraints, objectives, and how candidates are made."""
    set_ax_logger_levels(logging.WARNING)
    client = Client()
    client.configure_experiment(
        [_parameter(space, path, each) for path, each in space.searched().items()],
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
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ax.json"
        client.save_to_json_file(str(path))
        return path.read_text()


def from_json(text: str) -> Client:
    """The client that `as_json` was given."""
    set_ax_logger_levels(logging.WARNING)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ax.json"
        path.write_text(text)
        return Client.load_from_json_file(str(path))


def _parameter(
    space: SearchSpace, path: str, parameter: Parameter
) -> RangeParameterConfig | ChoiceParameterConfig:
    if parameter.bounds:
        low, high = (encoded(parameter, bound) for bound in parameter.bounds)
        kind: Any = "int" if parameter.int else "float"
        return RangeParameterConfig(name_of(path), (low, high), kind)
    values: Any = [encoded(parameter, value) for value in parameter.values]
    below: dict[Any, list[str]] = {}
    for child, each in space.searched().items():
        if each.condition and each.condition[0] == path:
            for value in each.condition[1]:
                below.setdefault(encoded(parameter, value), []).append(name_of(child))
    return ChoiceParameterConfig(
        name_of(path),
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

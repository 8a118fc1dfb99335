"""What is wrong with a configuration, in sentences: where, what, and what would be right."""

import difflib
import re
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel

Tree = dict[str, Any]
Path_ = tuple[str, ...]


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (nearest: 'x')` for the choice spelled most like `word`, or nothing."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (nearest: '{found[0]}')" if found else ""


@dataclass(frozen=True)
class Layer:
    """One voice in a configuration: a file, the command line, a sample."""

    origin: str
    values: Tree
    groups: dict[str, str] | None = None
    lines: dict[Path_, int] = field(default_factory=dict)
    problems: tuple[str, ...] = ()
    """What was wrong with it when it was read; that is no part of the rest."""

    def without(self, nodes: Collection[str]) -> "Layer":
        """What is left where nodes of the root are said anew."""
        values = {name: value for name, value in self.values.items() if name not in nodes}
        lines = {path: line for path, line in self.lines.items() if path[0] not in nodes}
        return replace(self, values=values, lines=lines)

    def says(self, path: str) -> bool:
        """Whether it gives this setting."""
        node: Any = self.values
        for part in path.split("."):
            if not isinstance(node, dict) or part not in node:
                return False
            node = node[part]
        return True


def listed(problems: Sequence[str]) -> str:
    """One problem as a sentence, several as a list."""
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems)


def explain(
    cls: type[BaseModel],
    errors: Iterable[Mapping[str, Any]],
    layers: Sequence[Layer],
    cause: Callable[[tuple[Any, ...]], tuple[Any, ...]],
) -> list[str]:
    """A sentence for every mistake of pydantic's; `cause` says of two whether they are one, made
    elsewhere."""
    told: dict[Any, str] = {}
    for each in errors:
        key = (cause(each["loc"]), each["type"])
        told.setdefault(key, _sentence(cls, dict(each), layers))
    return list(dict.fromkeys(told.values()))


def _sentence(cls: type[BaseModel], error: Tree, layers: Sequence[Layer]) -> str:
    path, choices = _locate(cls, error["loc"])
    said = error["input"]
    match error["type"]:
        case "extra_forbidden":
            text = f"there is no such setting{nearest(path[-1], choices)}; there are: " + ", ".join(
                sorted(choices)
            )
        case "missing":
            text = "has to be given"
        case "literal_error":
            wanted = _alternatives(error["ctx"]["expected"])
            text = f"{said!r} is not one of {', '.join(wanted)}{nearest(str(said), wanted)}"
        case "union_tag_invalid":
            wanted = _alternatives(error["ctx"]["expected_tags"])
            tag = error["ctx"]["tag"]
            path = (*path, "type")
            text = f"'{tag}' is not one of {', '.join(wanted)}{nearest(tag, wanted)}"
        case "model_type" | "dict_type":
            text = f"takes settings by name, not {said!r}"
        case "value_error":
            text = str(error["ctx"]["error"])
        case _:
            text = f"{error['msg'][0].lower()}{error['msg'][1:]}, not {said!r}"
    where = _where(path, layers)
    return f"{'.'.join(path)}{where}: {text}" if path else f"{text}"


def _alternatives(said: str) -> list[str]:
    """The values in pydantic's `'a', 'b' or 8`."""
    return [word.strip("'") for word in re.split(r", | or ", said)]


def _where(path: Path_, layers: Sequence[Layer]) -> str:
    for layer in reversed(layers):
        if path in layer.lines:
            return f" ({layer.origin}, line {layer.lines[path]})"
    return ""


def _kinds(annotation: Any) -> list[Any]:
    """The plain types that an annotation admits."""
    origin = get_origin(annotation)
    if origin is Annotated:
        return _kinds(get_args(annotation)[0])
    if origin in (Union, types.UnionType):
        return [kind for member in get_args(annotation) for kind in _kinds(member)]
    return [annotation]


def _is_model(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def _locate(cls: type[BaseModel], loc: Sequence[Any]) -> tuple[Path_, list[str]]:
    """The dotted path of pydantic's `loc`, less the tags of unions, and what fits at its end."""
    kinds: list[Any] = [cls]
    path: list[str] = []
    choices: list[str] = []
    for part in loc:
        models = [kind for kind in kinds if _is_model(kind)]
        tagged = [m for m in models if "type" in m.model_fields and part in _tags(m)]
        choices = sorted({name for model in models for name in model.model_fields})
        if tagged and part not in choices:
            kinds = tagged
            continue
        path.append(str(part))
        owners = [m for m in models if part in m.model_fields]
        if owners:
            kinds = _kinds(owners[0].model_fields[part].annotation)
        else:
            kinds = [
                inner
                for kind in kinds
                if get_origin(kind) in (dict, list, tuple)
                for inner in _kinds(get_args(kind)[-1])
            ]
            if not kinds and not models:
                path.pop()  # a member of a plain union, such as `float` of `float | str`
    return tuple(path), choices


def _tags(model: type[BaseModel]) -> tuple[Any, ...]:
    annotation = model.model_fields["type"].annotation
    return get_args(annotation) if get_origin(annotation) is Literal else ()

"""The machinery of configuration: frozen settings, YAML groups, dotted overrides, readable errors.

Only the machinery lives here; settings classes live beside the code they configure. A configuration
is a function of its *layers* (chosen groups, then files, then overrides), so that one operation,
`override`, serves the command line, Tune samples, tests and resume alike.
"""

import difflib
import re
import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

Tree = dict[str, Any]
Root = TypeVar("Root", bound="Composed")
Path_ = tuple[str, ...]


class UserError(ValueError):
    """What a user can put right: where it is, what is wrong, and what would be right."""


def nearest(word: str, choices: Iterable[str]) -> str:
    """` (nearest: 'x')` for the choice spelled most like `word`, or nothing."""
    found = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f" (nearest: '{found[0]}')" if found else ""


class Settings(BaseModel):
    """Frozen, typed, and refusing what it does not know."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", validate_default=True, protected_namespaces=()
    )

    @model_validator(mode="before")
    @classmethod
    def _keep_default_types(cls, values: Any) -> Any:
        """A node of a tagged union that does not name its `type` is of the default's."""
        if not isinstance(values, dict):
            return values
        for name, info in cls.model_fields.items():
            kind, said = getattr(info.default, "type", None), values.get(name)
            if kind is not None and isinstance(said, dict) and "type" not in said:
                values = {**values, name: {"type": kind, **said}}
        return values


# ------------------------------------------------------------------------------------------ YAML


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a float, `no` a word, a key given twice an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise UserError(f"line {line}: '{key}' was already given on line {seen[key]}")
            seen[key] = line
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith((":bool", ":float"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:bool", re.compile(r"^(?:true|True|false|False)$"), list("tTfF")
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)$|^[-+]?(?:\d[\d_]*\.\d*|\.\d+)$"
               r"|^[-+]?\.(?:inf|Inf)$|^\.(?:nan|NaN)$"),
    list("-+0123456789."),
)  # fmt: skip


def parse_value(text: str) -> Any:
    """The value of `key=text`: YAML where it is YAML, else the text itself."""
    try:
        return yaml.load(text, _Loader)
    except yaml.YAMLError:
        return text


def parse_yaml(text: str, origin: str) -> tuple[Tree, dict[Path_, int]]:
    """A YAML mapping and the line on which each of its paths is given."""
    try:
        tree = yaml.load(text, _Loader)
        root = yaml.compose(text, _Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{origin}, line {mark.line + 1}" if mark else origin
        problem = getattr(error, "problem", None) or str(error)
        hint = "; YAML wants spaces, not tabs" if "'\\t'" in problem else ""
        raise UserError(f"{where}: {problem}{hint}") from None
    except UserError as error:
        raise UserError(f"{origin}, {error}") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: expected 'key: value' lines, found {type(tree).__name__}")
    return tree, dict(_lines(root))


def _lines(node: Any, path: Path_ = ()) -> Iterator[tuple[Path_, int]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        here = (*path, key.value)
        yield here, key.start_mark.line + 1
        yield from _lines(value, here)


# ---------------------------------------------------------------------------------------- layers


@dataclass(frozen=True)
class Layer:
    """One voice in a configuration: a file, the command line, a sample."""

    origin: str
    values: Tree
    groups: dict[str, str] | None = None
    lines: dict[Path_, int] = field(default_factory=dict)


def merge(base: Tree, over: Mapping[str, Any]) -> Tree:
    """`over` on top of `base`; a node whose `type` changes starts afresh."""
    fresh = "type" in over and over["type"] != base.get("type")
    merged = {} if fresh else dict(base)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, Mapping):
            merged[key] = merge(below if isinstance(below, dict) else {}, value)
        else:
            merged[key] = value
    return merged


def _nest(flat: Mapping[str, Any]) -> Tree:
    """`{"a.b": c}` as a tree; `type` leaves first, since they reset what stands beside them."""
    tree: Tree = {}
    order = sorted(flat, key=lambda path: (path.split(".")[-1] != "type", path.count(".")))
    for path in order:
        *parents, leaf = path.split(".")
        node: Tree = {leaf: flat[path]}
        for part in reversed(parents):
            node = {part: node}
        tree = merge(tree, node)
    return tree


class Composed(Settings):
    """The root of a configuration: groups of YAML files, a file, and dotted overrides.

    Every file of a group is a partial document of the root, which may `include` others, so a group
    needs no code. Groups that share a slot exclude each other.
    """

    configs: ClassVar[Path]
    default_groups: ClassVar[dict[str, str]]
    """Slot -> 'group/name', in the order in which they are laid down."""
    slots: ClassVar[dict[str, str]] = {}
    """Group -> the slot it fills, where that is not its own name."""

    _layers: tuple[Layer, ...] = PrivateAttr(default=())

    @classmethod
    def load(cls: type[Root], path: str | None = None, overrides: Sequence[str] = ()) -> Root:
        """The configuration that an optional YAML file and `key=value` words describe."""
        layers = [] if path is None else [cls._file(path)]
        words = dict(_split(word) for word in overrides)
        return cls.compose([*layers, cls._spoken("the command line", words)])

    @classmethod
    def load_text(cls: type[Root], text: str, origin: str) -> Root:
        """The configuration of YAML text, such as the `config.yaml` of a run."""
        return cls.compose([cls._layer(text, origin)])

    def override(self: Root, values: Mapping[str, Any]) -> Root:
        """This configuration with `{dotted.path: value}` said on top of it."""
        return self.compose([*self._layers, self._spoken("override", values)])

    @classmethod
    def compose(cls: type[Root], layers: Sequence[Layer]) -> Root:
        """Lay the groups down, then the layers; validate; explain all problems at once."""
        chosen = dict(cls.default_groups)
        for layer in layers:
            if layer.groups is not None and layer.lines:
                chosen = {}  # a file that speaks of groups means exactly these
            for group, name in (layer.groups or {}).items():
                chosen[cls.slots.get(group, group)] = f"{group}/{name}"
        preset: Tree = {}
        for document in chosen.values():
            preset = merge(preset, cls.document(document))
        try:
            config = cls.model_validate(cls.arrange(preset, [layer.values for layer in layers]))
        except ValidationError as error:
            raise UserError(_explain(cls, error, layers)) from None
        problems = config.problems()
        if problems:
            raise UserError(_listed(problems))
        config._layers = tuple(layers)
        return config

    @classmethod
    def arrange(cls, preset: Tree, said: Sequence[Tree]) -> Tree:
        """How presets and what users said become one document; later voices win."""
        for tree in said:
            preset = merge(preset, tree)
        return preset

    @classmethod
    def cause(cls, loc: tuple[Any, ...]) -> tuple[Any, ...]:
        """Where a mistake at `loc` was made, if `arrange` copied it there; it is told once."""
        return loc

    def problems(self) -> list[str]:
        """Contradictions between settings that are each legal: one sentence each."""
        return []

    def dump(self) -> str:
        """YAML that loads to this very configuration, whatever the presets become."""
        values = {"groups": {}, **self.model_dump(mode="json")}
        return yaml.safe_dump(values, sort_keys=False, allow_unicode=True)

    # ------------------------------------------------------------------------------- groups

    @classmethod
    def groups(cls) -> dict[str, dict[str, str]]:
        """Group -> choice -> its one-line description (the first comment of the file)."""
        found: dict[str, dict[str, str]] = {}
        for path in sorted(cls.configs.glob("*/*.yaml")):
            first = path.read_text().split("\n", 1)[0]
            found.setdefault(path.parent.name, {})[path.stem] = first.lstrip("# ").strip()
        return found

    @classmethod
    def document(cls, name: str) -> Tree:
        """The partial document `group/name`, with what it includes below it."""
        group, _, choice = name.partition("/")
        choices = cls.groups().get(group, {})
        if choice not in choices:
            known = ", ".join(choices) or "none"
            raise UserError(
                f"{group}={choice}: no such choice{nearest(choice, choices)}; there are: {known}"
            )
        path = cls.configs / group / f"{choice}.yaml"
        tree, _ = parse_yaml(path.read_text(), str(path.name))
        below: Tree = {}
        for included in tree.pop("include", []):
            below = merge(below, cls.document(included))
        return merge(below, tree)

    @classmethod
    def _file(cls, path: str) -> Layer:
        if not Path(path).is_file():
            siblings = [p.name for p in Path(path).parent.glob("*.y*ml")]
            raise UserError(f"--config {path}: no such file{nearest(Path(path).name, siblings)}")
        return cls._layer(Path(path).read_text(), path)

    @classmethod
    def _layer(cls, text: str, origin: str) -> Layer:
        tree, lines = parse_yaml(text, origin)
        return Layer(origin, tree, tree.pop("groups", None), lines)

    @classmethod
    def _spoken(cls, origin: str, values: Mapping[str, Any]) -> Layer:
        groups = cls.groups()
        chosen = {key: str(v) for key, v in values.items() if key in groups and _is_name(v)}
        rest = {key: value for key, value in values.items() if key not in chosen}
        roots = {key.split(".")[0] for key in rest}
        known = {*cls.model_fields, *groups}
        strangers = [
            f"{root}: there is no such setting or group{nearest(root, known)}; "
            f"there are: {', '.join(sorted(known))}"
            for root in sorted(roots - set(cls.model_fields))
        ]
        if strangers:
            raise UserError(_listed(strangers))
        return Layer(origin, _nest(rest), chosen or None)


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _split(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"'{word}': expected key=value or group=name (see --help)")
    return key, parse_value(value)


# ------------------------------------------------------------------------------------ explaining


def _listed(problems: Sequence[str]) -> str:
    if len(problems) == 1:
        return problems[0]
    return f"{len(problems)} problems:\n" + "\n".join(f"  - {p}" for p in problems)


def _explain(cls: type[BaseModel], error: ValidationError, layers: Sequence[Layer]) -> str:
    told: dict[Any, str] = {}
    for each in error.errors():
        cause = cls.cause(each["loc"]) if issubclass(cls, Composed) else each["loc"]
        told.setdefault((cause, each["type"]), _sentence(cls, dict(each), layers))
    return _listed(list(dict.fromkeys(told.values())))


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
            wanted = re.findall(r"'([^']*)'", error["ctx"]["expected"])
            text = f"{said!r} is not one of {', '.join(wanted)}{nearest(str(said), wanted)}"
        case "union_tag_invalid":
            wanted = re.findall(r"'([^']*)'", error["ctx"]["expected_tags"])
            tag = error["ctx"]["tag"]
            path = (*path, "type")
            text = f"'{tag}' is not one of {', '.join(wanted)}{nearest(tag, wanted)}"
        case "value_error":
            text = str(error["ctx"]["error"])
        case _:
            text = f"{error['msg'][0].lower()}{error['msg'][1:]}, not {said!r}"
    where = _where(path, layers)
    return f"{'.'.join(path)}{where}: {text}" if path else f"{text}"


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

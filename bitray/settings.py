"""The machinery of configuration: frozen settings, YAML groups, dotted overrides, readable errors.

Only the machinery lives here; settings classes live beside the code they configure. A configuration
is a function of its *layers* (chosen groups, then files, then overrides), so that one operation,
`override`, serves the command line, Tune samples, tests and resume alike.
"""

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, PrivateAttr, ValidationError, model_validator

from bitray.explaining import Layer, Path_, Tree, explain, listed, nearest

__all__ = [
    "Composed",
    "Layer",
    "Passing",
    "Settings",
    "Tree",
    "UserError",
    "listed",
    "merge",
    "nearest",
]

Root = TypeVar("Root", bound="Composed")


class UserError(ValueError):
    """What a user can put right: where it is, what is wrong, and what would be right."""


class Passing(UserError):
    """What ended a run for no fault of its settings: once it is over, the same command goes on."""


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

    @classmethod
    def default_types(cls) -> Tree:
        """The `type` of every node below that has one by default."""
        found: Tree = {}
        for name, info in cls.model_fields.items():
            kind, inner = getattr(info.default, "type", None), info.annotation
            if kind is not None:
                found[name] = {"type": kind}
            elif isinstance(inner, type) and issubclass(inner, Settings):
                found[name] = inner.default_types()
        return found


# ------------------------------------------------------------------------------------------ YAML


class _Loader(yaml.SafeLoader):
    """YAML as people mean it: `1e-4` is a float, `no` and `2026-01-01` are words, a key given twice
    is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in seen:
                raise UserError(f"line {line}: '{key}' was already given on line {seen[key]}")
            seen[key] = line
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if not pair[0].endswith((":bool", ":float", ":timestamp"))]
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
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        hint = "; YAML wants spaces, not tabs" if "'\\t'" in problem else ""
        raise UserError(f"{where}: {problem}{hint}") from None
    except UserError as error:
        raise UserError(f"{origin}, {error}") from None
    if tree is None:
        return {}, {}
    if not isinstance(tree, dict):
        raise UserError(f"{origin}: expected 'key: value' lines, found {type(tree).__name__}")
    return {str(key): value for key, value in tree.items()}, dict(_lines(root))


def _lines(node: Any, path: Path_ = ()) -> Iterator[tuple[Path_, int]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        here = (*path, key.value)
        yield here, key.start_mark.line + 1
        yield from _lines(value, here)


# ---------------------------------------------------------------------------------------- layers


def merge(base: Any, over: Any, types: Any = None) -> Any:
    """`over` on top of `base`; a node whose `type` changes starts afresh. `types`: of nodes that do
    not name theirs."""
    if not isinstance(over, Mapping):
        return over
    base, types = (known if isinstance(known, Mapping) else {} for known in (base, types))
    if "type" in over and over["type"] != base.get("type", types.get("type")):
        base = {}
    said = {key: merge(base.get(key), value, types.get(key)) for key, value in over.items()}
    return {**base, **said}


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


_FOLLOW = ("missing", "value_error", "too_short", "union_tag_not_found")
"""Mistakes that a group which is not there may be the reason of."""


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
    aliases: ClassVar[dict[str, str]] = {}
    """Another name of a group or setting -> its name."""
    nodes: ClassVar[dict[str, str]] = {}
    """Slot -> the setting that its groups are about, where that has not its name."""

    _layers: tuple[Layer, ...] = PrivateAttr(default=())

    @classmethod
    def load(cls: type[Root], path: str | None = None, overrides: Sequence[str] = ()) -> Root:
        """The configuration that an optional YAML file and `key=value` words describe."""
        layers = [] if path is None else [cls._file(path)]
        return cls.compose([*layers, cls.spoken(overrides)])

    @classmethod
    def spoken(cls, overrides: Sequence[str]) -> Layer:
        """What `key=value` words of the command line say."""
        values, problems = dict[str, Any](), []
        for word in overrides:
            try:
                key, values[key] = _split(word)
            except UserError as error:
                problems.append(str(error))
        layer = cls._spoken("the command line", values)
        return replace(layer, problems=(*problems, *layer.problems))

    @classmethod
    def load_text(cls: type[Root], text: str, origin: str) -> Root:
        """The configuration of YAML text, such as the `config.yaml` of a run."""
        return cls.compose([cls.layer(origin, *parse_yaml(text, origin))])

    def override(self: Root, values: Mapping[str, Any]) -> Root:
        """This configuration with `{dotted.path: value}` said on top of it."""
        return self.compose([*self._layers, self._spoken("override", values)])

    @classmethod
    def compose(cls: type[Root], layers: Sequence[Layer]) -> Root:
        """Lay the groups down, then the layers; validate; explain all problems at once."""
        preset, lacking = cls._presets(layers)
        heard = cls._heard(layers)
        tree, strange = cls.arrange(preset, heard)
        unread = [problem for layer in layers for problem in layer.problems]
        problems = [*unread, *lacking.values(), *strange]
        known = not unread and not lacking  # else settings may be at odds with what is not there
        try:
            config = cls._of(tree, layers)
            problems += config.problems() if known else []
        except ValidationError as error:
            own = (each for each in error.errors() if not _follows(each, lacking))
            problems += explain(cls, own, heard, cls.cause)
            problems += cls._besides(tree, preset, layers, error) if known else []
        if problems:
            raise UserError(listed(problems))
        return config

    @classmethod
    def _presets(cls, layers: Sequence[Layer]) -> tuple[Tree, dict[str, str]]:
        """What the chosen groups say; and by setting, why a group about it says nothing."""
        chosen = dict(cls.default_groups)
        for layer in layers:
            if layer.groups is not None and layer.lines:
                chosen = {}  # a file that speaks of groups means exactly these
            for group, name in (layer.groups or {}).items():
                chosen[cls.slots.get(group, group)] = f"{group}/{name}"
        preset, lacking = Tree(), dict[str, str]()
        for slot, document in chosen.items():
            try:
                preset = merge(preset, cls.document(document), cls.default_types())
            except UserError as error:
                lacking[cls.nodes.get(slot, slot)] = str(error)
        return preset, lacking

    @classmethod
    def _heard(cls, layers: Sequence[Layer]) -> list[Layer]:
        """The layers; a group that a later one chooses takes the place of what was said before."""
        heard, replaced = list[Layer](), set[str]()
        for layer in reversed(layers):
            heard.insert(0, layer.without(replaced))
            slots = (cls.slots.get(group, group) for group in layer.groups or {})
            replaced |= {cls.nodes.get(slot, slot) for slot in slots}
        return heard

    @classmethod
    def _of(cls: type[Root], tree: Tree, layers: Sequence[Layer]) -> Root:
        config = cls.model_validate(tree)
        config._layers = tuple(layers)
        return config

    @classmethod
    def _besides(
        cls, tree: Tree, preset: Tree, layers: Sequence[Layer], error: ValidationError
    ) -> list[str]:
        """Contradictions among the settings that are valid; none if too little is left of them."""
        for each in error.errors():
            tree = _restored(tree, preset, each["loc"])
        try:
            return cls._of(tree, layers).problems()
        except ValidationError:
            return []

    @classmethod
    def arrange(cls, preset: Tree, layers: Sequence[Layer]) -> tuple[Tree, list[str]]:
        """How presets and what users said become one document, and what has no place in it; later
        voices win."""
        for layer in layers:
            preset = merge(preset, layer.values, cls.default_types())
        return preset, []

    @classmethod
    def cause(cls, loc: tuple[Any, ...]) -> tuple[Any, ...]:
        """Where a mistake at `loc` was made, if `arrange` copied it there; it is told once."""
        return loc

    def problems(self) -> list[str]:
        """Contradictions between settings that are each legal: one sentence each."""
        return []

    def last_said(self, *paths: str) -> int:
        """The number of the last voice that gave any of these settings; -1: only presets did."""
        heard = self._heard(self._layers)
        said = [k for k, layer in enumerate(heard) if any(map(layer.says, paths))]
        return max(said, default=-1)

    def spelled(self) -> Tree:
        """A document that loads to this very configuration, whatever the presets become."""
        return {"groups": {}, **self.model_dump(mode="json")}

    def dump(self) -> str:
        """`spelled` as YAML."""
        return yaml.safe_dump(self.spelled(), sort_keys=False, allow_unicode=True)

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
        groups = cls.groups()
        if group not in groups:
            raise UserError(
                f"groups.{group}: there is no such group{nearest(group, groups)}; there are: "
                + (", ".join(groups) or "none")
            )
        if choice not in groups[group]:
            raise UserError(
                f"{group}={choice}: no such choice{nearest(choice, groups[group])}; there are: "
                + ", ".join(groups[group])
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
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"--config {path}: not UTF-8 text: {error.reason}") from None
        return cls.layer(path, *parse_yaml(text, path))

    @classmethod
    def layer(cls, origin: str, tree: Tree, lines: dict[Path_, int]) -> Layer:
        """What a document says, its `groups` apart."""
        values = {name: value for name, value in tree.items() if name != "groups"}
        groups = tree.get("groups")
        if groups is None:
            return Layer(origin, values, None, lines)
        if not isinstance(groups, dict):
            problem = f"groups ({origin}): takes choices by name, {{model: demo}}, not {groups!r}"
            return Layer(origin, values, None, lines, (problem,))
        named = {cls.aliases.get(str(key), str(key)): name for key, name in groups.items()}
        return Layer(origin, values, named, lines)

    @classmethod
    def _named(cls, path: str) -> str:
        root, dot, rest = path.partition(".")
        return f"{cls.aliases.get(root, root)}{dot}{rest}"

    @classmethod
    def _spoken(cls, origin: str, values: Mapping[str, Any]) -> Layer:
        groups = cls.groups()
        values = {cls._named(key): value for key, value in values.items()}
        unchosen = [key for key, value in values.items() if key in groups and value is None]
        problems = [f"{key}: nothing is chosen; there are: {', '.join(groups[key])}"
                    for key in unchosen]  # fmt: skip
        chosen = {key: str(v) for key, v in values.items() if key in groups and _is_name(v)}
        rest = {key: v for key, v in values.items() if key not in {*chosen, *unchosen}}
        known = {*cls.model_fields, *groups}
        strangers = sorted({key.split(".")[0] for key in rest} - set(cls.model_fields))
        problems += [
            f"{root}: there is no such setting or group{nearest(root, known)}; "
            f"there are: {', '.join(sorted(known))}"
            for root in strangers
        ]
        layer = Layer(origin, _nest(rest), chosen or None, problems=tuple(problems))
        return layer.without(strangers)


def _follows(error: Mapping[str, Any], lacking: Collection[str]) -> bool:
    """Whether a mistake may only be there because a group is not."""
    return bool(error["loc"]) and error["loc"][0] in lacking and error["type"] in _FOLLOW


def _restored(tree: Tree, preset: Tree, loc: Sequence[Any]) -> Tree:
    """`tree` with what `preset` says at pydantic's `loc`, which may be nothing."""
    if not loc:
        return tree
    key, *rest = loc
    if key not in tree:  # the tag of a union, which is no part of the path
        return _restored(tree, preset, rest)
    if rest and isinstance(tree[key], dict):
        below = preset.get(key)
        inner = _restored(tree[key], below if isinstance(below, dict) else {}, rest)
        return {**tree, key: inner}
    left = {name: value for name, value in tree.items() if name != key}
    return {**left, key: preset[key]} if key in preset else left


def _is_name(value: Any) -> bool:
    return isinstance(value, str | int | float) and not isinstance(value, bool)


def _split(word: str) -> tuple[str, Any]:
    key, equals, value = word.partition("=")
    if not equals or not key or key.startswith("-"):
        raise UserError(f"'{word}': expected key=value or group=name (see --help)")
    try:
        return key, parse_value(value)
    except UserError as error:
        raise UserError(f"{key}: {error}") from None

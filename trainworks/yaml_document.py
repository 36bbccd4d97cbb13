"""A run file as plain data: YAML read by the 1.2 core schema, and where each key of it was written."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import yaml
from yaml.composer import Composer
from yaml.parser import Parser
from yaml.reader import Reader, ReaderError
from yaml.resolver import BaseResolver
from yaml.scanner import Scanner

from trainworks.errors import ConfigError, Problem
from trainworks.redaction import Keys, is_token, safe_problem, shown

__all__ = ["Document", "Spot", "read_text", "to_yaml"]

MAX_BYTES = 256 * 1024
MAX_DEPTH = 40
MAX_DIGITS = 80
MAX_VALUES = 5_000
TOO_LONG = "more digits than any setting takes; put it in quotes if text is meant"
TOO_MANY = f"more than {MAX_VALUES} values, aliases written out"
SECRET = "looks like a secret; set HF_TOKEN in the environment instead"


def read_text(path: Path) -> str:
    """Return a run file's text; what is not a readable UTF-8 file of sensible size is a ConfigError."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise _file_error(path, f"there is no such file{_neighbours(path.parent, path.name)}") from None
    except IsADirectoryError:
        raise _file_error(path, f"this is a folder, give a run file{_neighbours(path, '')}") from None
    except (OSError, ValueError) as error:
        raise _file_error(path, f"cannot be read: {error}") from None
    if len(raw) > MAX_BYTES:
        raise _file_error(path, f"larger than {MAX_BYTES // 1024} KiB, so not a run file")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise ConfigError(
            [safe_problem(f"{path}:{line}", (), "this is not UTF-8 text; save the file as UTF-8")]
        ) from None


def _some(words: Sequence[str], most: int = 6) -> str:
    return ", ".join(words[:most]) + (", ..." if len(words) > most else "")


def _file_error(path: Path, message: str) -> ConfigError:
    return ConfigError([safe_problem(str(path), (), message)])


def _neighbours(folder: Path, name: str) -> str:
    try:
        names = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".yaml", ".yml"))
    except OSError:
        return ""
    stems = {Path(entry).stem: entry for entry in names}
    if meant := get_close_matches(Path(name).stem, stems, n=1):
        return f" (did you mean '{stems[meant[0]]}'?)"
    return f"; run files in {folder}: {_some(names)}" if names else f"; {folder} holds no .yaml file"


_YAML = "tag:yaml.org,2002:"
_SCALARS: dict[str, re.Pattern[str]] = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"(?:[-+]?[0-9][0-9_]*|0o[0-7]+|0x[0-9a-fA-F]+)\Z"),
    "float": re.compile(
        r"(?:[-+]?(?:\.[0-9]+|[0-9][0-9_]*(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}


def _unfit(text: str) -> str:
    """Return what is wrong with a text or a key; empty where nothing is."""
    if "\0" in text or any("\ud800" <= character <= "\udfff" for character in text):
        return "text holds a character that no file can hold"
    return SECRET if is_token(text) else ""


def _text(text: str) -> str:
    if wrong := _unfit(text):
        raise ValueError(wrong)
    return text


def _bool(text: str) -> bool:
    if not _SCALARS["bool"].match(text):
        raise ValueError("expected true or false")
    return text.lower() == "true"


def _int(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(TOO_LONG)
    return int(text, 0) if text[:2] in ("0x", "0o") else int(text.replace("_", ""))


def _float(text: str) -> float:
    if len(text) > MAX_DIGITS:
        raise ValueError(TOO_LONG)
    number = float(text.replace("_", "").replace(".inf", "inf").replace(".nan", "nan"))
    if not math.isfinite(number):
        raise ValueError("not a finite number; put it in quotes if text is meant")
    return number


_BUILDERS: dict[str, Callable[[str], Any]] = {
    _YAML + "null": lambda text: None,
    _YAML + "bool": _bool,
    _YAML + "int": _int,
    _YAML + "float": _float,
    _YAML + "str": _text,
}


class _Composer(Reader, Scanner, Parser, Composer, BaseResolver):
    """YAML text to marked nodes by the YAML 1.2 core schema, with bounded nesting, and not too many."""

    def __init__(self, text: str) -> None:
        Reader.__init__(self, text)
        Scanner.__init__(self)
        Parser.__init__(self)
        Composer.__init__(self)
        BaseResolver.__init__(self)
        self.depth = 0
        self.nodes = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self.depth += 1
        self.nodes += 1
        if self.depth > MAX_DEPTH or self.nodes > 2 * MAX_VALUES:  # a key is a node, too
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            deep = f"nested deeper than {MAX_DEPTH} levels"
            raise yaml.MarkedYAMLError(None, None, deep if self.depth > MAX_DEPTH else TOO_MANY, mark)
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


class _Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or 1.2 would read as something else, and writes no anchors."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    # PyYAML 6.0 folds the line breaks of Unicode inside single quotes, which reads back as other text.
    style = '"' if re.search("[\x85\u2028\u2029\ufeff]", text) else "|" if "\n" in text else None
    return dumper.represent_scalar(_YAML + "str", text, style=style)


_Dumper.add_representer(str, _represent_text)
for _name, _pattern in _SCALARS.items():
    _Composer.add_implicit_resolver(_YAML + _name, _pattern, None)
    _Dumper.add_implicit_resolver(_YAML + _name, _pattern, None)


def to_yaml(value: dict[str, Any]) -> str:
    """Write plain data as YAML in its own order; reading it gives the same data."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)


def _compose(text: str, where: Callable[[int], str]) -> yaml.Node | None:
    """Return the one document's root node, None when there is nothing; ConfigError on broken YAML."""
    try:
        return _Composer(text).get_single_node()
    except ReaderError as error:
        line, message = text.count("\n", 0, error.position), f"holds the unprintable character #x{error.character:02x}"
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line if mark else 0
        tabs = "; indent with spaces, not tabs" if "\\t" in str(error.problem) else ""
        message = f"not valid YAML: {', '.join(part for part in (error.context, error.problem) if part)}{tabs}"
    except (ValueError, OverflowError):
        line, message = 0, "not valid YAML: an escape such as \\U00110000 names no character"
    raise ConfigError([safe_problem(where(line), (), message)])


@dataclass(frozen=True)
class Spot:
    """Where a value stands, its place in the order of problems, and how to show it."""

    where: str
    order: int
    found: str


@dataclass
class Document:
    """The plain data of a run file, where each key of it was written, and the problems met so far."""

    data: dict[str, Any] = field(default_factory=dict)
    spots: dict[Keys, Spot] = field(default_factory=dict)
    problems: list[tuple[int, Problem]] = field(default_factory=list)
    broken: set[Keys] = field(default_factory=set)
    moved: set[Keys] = field(default_factory=set)

    def report(self, spot: Spot, keys: Keys, message: str) -> None:
        """Add a problem of `keys`, written at `spot`."""
        self.problems.append((spot.order, safe_problem(spot.where, keys, message)))

    def spot(self, keys: Keys) -> Spot:
        """Return where `keys` were written, or the nearest section above."""
        while keys not in self.spots:
            keys = keys[:-1]
        return self.spots[keys]

    def read(self, text: str, name: str) -> None:
        """Take in the file `name`; ConfigError when it is not YAML with keys, so that nothing else can be checked."""
        root = _compose(text, lambda line: f"{name}:{line + 1}")
        if root is None:
            raise ConfigError([safe_problem(name, (), "the file is empty: it says nothing but spaces and comments")])
        value = _Builder(self, lambda line: (f"{name}:{line + 1}", line)).build(root, (), root)
        if not isinstance(root, yaml.MappingNode):
            spot = self.spots[()]
            raise ConfigError([safe_problem(spot.where, (), f"expected `key: value` lines; found {spot.found}")])
        self.data = value

    def override(self, text: str, number: int) -> None:
        """Set one `dotted.key=value`, making the sections on the way that are not there."""
        name, equals, value = text.partition("=")
        keys = tuple(name.strip().split("."))
        where = f"override '{shown((), name)}{equals}{shown(keys, value)}'"
        spot = Spot(where, 10**9 + number, "nothing")
        if not equals or not all(keys):
            self.report(spot, (), "expected key=value, such as optim.lr=1e-4")
            return
        if wrong := _unfit(name):
            self.report(spot, keys, wrong)
            return
        try:
            node = _compose(value, lambda line: where)
        except ConfigError as error:
            self.problems.extend((spot.order, problem) for problem in error.problems)
            return
        target = self.make_section(keys[:-1], spot)
        if target is None:
            return
        self.forget(keys)
        self.spots[keys], target[keys[-1]] = spot, None
        if node is not None:
            target[keys[-1]] = _Builder(self, lambda line: (where, spot.order)).build(node, keys, node)

    def make_section(self, keys: Keys, spot: Spot) -> dict[str, Any] | None:
        """Return the mapping at `keys`, made where there is none; None, and a problem, where a value stands."""
        target = self.data
        for depth, key in enumerate(map(str, keys), start=1):
            if target.get(key) is None:
                target[key] = {}
                self.spots[keys[:depth]] = spot
            if not isinstance(target[key], dict):
                self.report(spot, keys[:depth], f"not a section; found {shown(keys, self.spot(keys[:depth]).found)}")
                return None
            target = target[key]
        return target

    def forget(self, keys: Keys) -> None:
        """Drop where `keys`, and all below them, were written."""
        self.spots = {path: spot for path, spot in self.spots.items() if path[: len(keys)] != keys}

    def section(self, keys: Keys) -> dict[str, Any] | None:
        """Return the mapping at `keys`, None when there is none."""
        value: Any = self.data
        for key in keys:
            try:
                value = value[key]
            except (LookupError, TypeError):
                return None
        return value if isinstance(value, dict) else None

    def move(self, old: Keys, new: Keys | None) -> None:
        """Put a misplaced key where it was meant, or take it out, so that what else is wrong shows."""
        value = (self.section(old[:-1]) or {}).pop(str(old[-1]))
        moved = {path[len(old) :]: spot for path, spot in self.spots.items() if path[: len(old)] == old}
        self.forget(old)
        target = None if new is None else self.section(new[:-1])
        if new is not None and target is not None and new[-1] not in target:
            target[str(new[-1])] = value
            self.moved.add(new)
            self.spots |= {(*new, *rest): spot for rest, spot in moved.items()}


@dataclass
class _Builder:
    """Nodes to plain values: no tags, no surprises, and a bound on what aliases expand to."""

    document: Document
    locate: Callable[[int], tuple[str, int]]
    values: int = 0

    def build(self, node: yaml.Node, keys: Keys, key_node: yaml.Node) -> Any:
        where, order = self.locate(key_node.start_mark.line)
        self.values += 1
        if self.values > MAX_VALUES or len(keys) > MAX_DEPTH:
            raise ConfigError([safe_problem(where, keys, TOO_MANY)])
        spot = self.document.spots[keys] = Spot(where, order, _found(node))
        if isinstance(node, yaml.MappingNode) and node.tag == _YAML + "map":
            return self.mapping(node, keys)
        if isinstance(node, yaml.SequenceNode) and node.tag == _YAML + "seq":
            return [self.build(item, (*keys, index), item) for index, item in enumerate(node.value)]
        try:
            if isinstance(node, yaml.ScalarNode) and node.tag in _BUILDERS:
                return _BUILDERS[node.tag](node.value)
            message = f"the tag {shown((), node.tag.replace(_YAML, '!!'))} is not allowed; remove it"
        except ValueError as error:
            message = f"{error}; found {shown(keys, spot.found)}" if node.tag != _YAML + "str" else str(error)
        self.document.broken.add(keys)
        self.document.report(spot, keys, message)
        return None

    def mapping(self, node: yaml.MappingNode, keys: Keys) -> dict[str, Any]:
        values: dict[str, Any] = {}
        lines: dict[str, str] = {}
        for key_node, value_node in node.value:
            where, order = self.locate(key_node.start_mark.line)
            key, wrong = key_node.value, ""
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in _BUILDERS:
                key, wrong = "?", "a key must be plain text"
            elif key == "<<" and key_node.style is None:
                wrong = "merge keys are not read; write the keys out"
            elif key in values:
                wrong = f"set twice; first at {lines[key]}"
            else:
                wrong = _unfit(key)
            if wrong:
                self.document.report(Spot(where, order, ""), (*keys, key), wrong)
                continue
            lines[key] = where
            values[key] = self.build(value_node, (*keys, key), key_node)
        return values


def _found(node: yaml.Node) -> str:
    if isinstance(node, yaml.ScalarNode):
        return repr(node.value) if node.tag == _YAML + "str" else node.value or "nothing"
    return "a list" if isinstance(node, yaml.SequenceNode) else "a section"

"""A document checked against a model: the configuration, or every problem at its line with how to mend it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import Tag, ValidationError
from pydantic_core import ErrorDetails

from trainworks.errors import ConfigError, Problem, nearest
from trainworks.redaction import REDACTED, Keys, dotted, is_secret, shown
from trainworks.settings import Settings
from trainworks.yaml_document import Document

__all__ = ["validate"]

MAX_SECTIONS = 5
MAX_PROBLEMS = 100
FEW_KEYS = 24

M = TypeVar("M", bound=Settings)


def validate(document: Document, model: type[M]) -> M:
    """Return `document` as a `model`; ConfigError with every problem, those met while reading it too, in order."""
    config = _validated(document, model)
    if config is None or document.problems:
        raise ConfigError(_in_order(document))
    return config


def _in_order(document: Document) -> list[Problem]:
    """Return the first problems in the order of the file, and how many more there are."""
    problems = [problem for _, problem in sorted(document.problems, key=lambda item: item[0])]
    if len(problems) <= MAX_PROBLEMS:
        return problems
    rest = Problem(problems[MAX_PROBLEMS].where, "", f"and {len(problems) - MAX_PROBLEMS:,} more from here on")
    return [*problems[:MAX_PROBLEMS], rest]


def _validated(document: Document, model: type[M]) -> M | None:
    """Validate until nothing is left that hides other problems: misspelt keys and types are mended and reported."""
    while True:
        try:
            return model.model_validate(document.data)
        except ValidationError as error:
            errors = [(_Place.of(model, item["loc"]), item) for item in error.errors(include_url=False)[:MAX_PROBLEMS]]
        sections = _sections(model)
        # What another kind of the same section knows waits: a key mended before may show that this kind is meant.
        for waits in (False, True):
            now = [item for item in errors if item[0].known_beside(sections) == waits]
            mended = [_mend(document, sections, *item) for item in now]
            if any(mended):
                break
        else:
            _report(document, errors)
            return None
        if len(document.problems) >= MAX_PROBLEMS:
            return None


def _closest(word: str, known: Iterable[str]) -> str | None:
    return nearest(word, known).removeprefix(" (did you mean '").removesuffix("'?)") or None


def _mend(document: Document, sections: Sequence[_Section], place: _Place, error: ErrorDetails) -> bool:
    """Report a mistake that may hide others and mend the data, so that the next validation finds them."""
    if error["type"] == "extra_forbidden" and place.keys[-1] in (document.section(place.keys[:-1]) or ()):
        _unknown_key(document, sections, place)
        return True
    if error["type"] == "union_tag_invalid":
        return _unknown_type(document, place, error["ctx"]["tag"])
    return False


def _unknown_key(document: Document, sections: Sequence[_Section], place: _Place) -> None:
    """Report a key that its section does not know, and put it where it was most likely meant."""
    above, key = place.keys[:-1], str(place.keys[-1])
    own = list(place.section.model_fields) if place.section else []
    given = document.section(above) or {}
    beside = [name for section in sections if section.keys == above and not section.type for name in section.fields]
    others = [name for name in beside if name != key]
    candidates = ([name for name in own if name not in given] + others, own)
    meant = next((found for names in candidates if (found := _closest(key, names))), None)
    homes = [section for section in sections if key in section.fields and key not in beside]
    if place.keys not in document.moved:
        message = f"unknown key (did you mean '{meant}'?)" if meant else "unknown key"
        if homes:
            message += f"; belongs under {' or '.join([str(home) for home in homes][:3])}"
        elif len(own) <= FEW_KEYS:
            message += f"; known: {', '.join(own)}"
        document.report(document.spot(place.keys), place.keys, message)
    if homes:
        sure = len(homes) == 1 and not meant and not above
        document.move(place.keys, (*homes[0].keys, key) if sure else None)
    else:
        document.move(place.keys, (*above, meant) if meant else None)


def _unknown_type(document: Document, place: _Place, tag: str) -> bool:
    """Set a misspelt type to the nearest one, so that the section's other keys are checked too."""
    meant, section = _closest(tag, place.types), document.section(place.keys)
    if not meant or section is None:
        return False
    document.report(document.spot((*place.keys, "type")), (*place.keys, "type"), _wrong_type(place, tag))
    section["type"] = meant
    return True


def _wrong_type(place: _Place, tag: str) -> str:
    return f"unknown type {shown((), repr(tag))}{nearest(tag, place.types)}; known: {', '.join(place.types)}"


@dataclass(frozen=True)
class _Section:
    """A model below the top one: its keys, and its type where several models share them."""

    keys: Keys
    type: str
    fields: tuple[str, ...]

    def __str__(self) -> str:
        return dotted(self.keys) + (f" (type: {self.type})" if self.type else "")


def _sections(model: type[Settings], above: Keys = ()) -> list[_Section]:
    found = []
    for name, info in model.model_fields.items():
        members = [member for member in map(_bare, _members(info.annotation)) if _is_settings(member)]
        for member in members if len(above) < MAX_SECTIONS else ():
            tag = _types(member)[0] if len(members) > 1 and _types(member) else ""
            found += [_Section((*above, name), tag, tuple(member.model_fields)), *_sections(member, (*above, name))]
    return found


def _report(document: Document, errors: Sequence[tuple[_Place, ErrorDetails]]) -> None:
    """Report each key once: what the members of a union say of it is joined by `or`."""
    grouped: dict[Keys, list[tuple[_Place, ErrorDetails]]] = {}
    for place, error in errors:
        grouped.setdefault(place.keys, []).append((place, error))
    for keys, group in grouped.items():
        # A union reports its failed members at the value and the best one below it; the deeper says more.
        deeper = any(len(other) > len(keys) and other[: len(keys)] == keys for other in grouped)
        if not deeper and not any(keys[: len(path)] == path for path in document.broken):
            _report_key(document, *group[0], list(dict.fromkeys(_expected(place, error) for place, error in group)))


def _report_key(document: Document, place: _Place, error: ErrorDetails, expected: list[str]) -> None:
    keys, message = place.keys, " or ".join(expected)
    match error["type"]:
        case "union_tag_invalid":
            keys, message = (*keys, "type"), _wrong_type(place, error["ctx"]["tag"])
        case "union_tag_not_found":
            keys, message = (*keys, "type"), f"required key is missing; known: {', '.join(place.types)}"
        case "missing" if isinstance(last := keys[-1], int):
            keys, message = keys[:-1], f"the list is too short: item {last + 1} is missing"
        case "missing":
            message = f"required key is missing{place.doc}"
        case "value_error" | "assertion_error":
            message = message.replace(str(error["input"]), REDACTED) if is_secret(keys) else message
        case _:
            # What was not written as a value is a key, checked by the type that a mapping declares for its keys.
            found = document.spots[keys].found if keys in document.spots else repr(error["input"])
            message = f"expected {message}; found {shown(keys, found)}{_mend_value(error, message)}"
    document.report(document.spot(keys), keys, message)


def _mend_value(error: ErrorDetails, expected: str) -> str:
    if error["type"] == "string_type" and isinstance(error["input"], int | float):
        return "; put it in quotes"
    return nearest(str(error["input"]), re.findall(r"'([^']*)'", expected))


_PLAIN = {
    "string_type": "text",
    "int_type": "a whole number",
    "float_type": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "tuple_type": "a list",
    "list_type": "a list",
    "dict_type": "a section of `key: value` lines",
    "model_type": "a section of `key: value` lines",
    "model_attributes_type": "a section of `key: value` lines",
    "string_too_short": "text that is not empty",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "float_parsing": "a number",
    "too_short": "a list of {min_length} or more",
    "too_long": "a list of {max_length} at most",
}


def _expected(place: _Place, error: ErrorDetails) -> str:
    if error["type"] in ("value_error", "assertion_error"):
        return str(error["ctx"]["error"])
    types = f", its type one of {', '.join(place.types)}" if error["type"] == "model_attributes_type" else ""
    if error["type"] in _PLAIN:
        plain = _PLAIN[error["type"]].format_map(error.get("ctx", {}))
    else:
        plain = error["msg"].removeprefix("Input should be ")
    return ("a number " if plain.startswith(("greater", "less")) else "") + plain + types


@dataclass(frozen=True)
class _Place:
    """What a pydantic location means in the file: its keys without union tags, and the models met on the way."""

    keys: Keys
    section: type[Settings] | None
    """The model whose field the last key is, or would be."""
    annotation: Any
    """The type declared at the end of the keys."""

    @classmethod
    def of(cls, model: type[Settings], location: Keys) -> _Place:
        keys: list[str | int] = []
        section: type[Settings] | None = None
        annotation: Any = model
        for part in location:
            members = _members(annotation)
            if len(members) > 1:
                annotation = next((member for member in members if part in _tags(member)), Any)
            elif _is_settings(bare := _bare(members[0])):
                section = bare
                info = section.model_fields.get(str(part))
                keys.append(part)
                annotation = info.annotation if info else Any
            else:
                section = None
                keys.append(part)
                annotation = next(reversed([item for item in get_args(bare) if item is not Ellipsis]), Any)
        return cls(tuple(keys), section, annotation)

    def known_beside(self, sections: Sequence[_Section]) -> bool:
        """Say whether another kind of the section that holds the last key knows it."""
        return any(
            self.keys[:-1] == section.keys and self.keys[-1] in section.fields for section in sections if self.keys
        )

    @property
    def types(self) -> list[str]:
        return [tag for member in _members(self.annotation) for tag in _types(member)]

    @property
    def doc(self) -> str:
        info = self.section.model_fields.get(str(self.keys[-1])) if self.section else None
        return f": {' '.join(info.description.split())}" if info and info.description else ""


def _bare(annotation: Any) -> Any:
    return get_args(annotation)[0] if get_origin(annotation) is Annotated else annotation


def _members(annotation: Any) -> list[Any]:
    """Return the members of a union besides None, or the one type that there is."""
    bare = _bare(annotation)
    if get_origin(bare) not in (Union, UnionType):
        return [annotation]
    members = [member for member in get_args(bare) if member is not NoneType]
    return members if len(members) > 1 else _members(members[0])


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Settings)


def _types(annotation: Any) -> list[str]:
    """Return the values that the field `type` of a section may have."""
    bare = _bare(annotation)
    info = bare.model_fields.get("type") if _is_settings(bare) else None
    return (
        [str(value) for value in get_args(info.annotation)] if info and get_origin(info.annotation) is Literal else []
    )


def _tags(member: Any) -> list[str]:
    """Return the names by which a pydantic location may call a member of a union."""
    tags = [item.tag for item in getattr(member, "__metadata__", ()) if isinstance(item, Tag)]
    return [*tags, *_types(member), getattr(_bare(member), "__name__", "")]

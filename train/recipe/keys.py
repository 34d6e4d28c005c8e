"""A key of a recipe in one line: its type, default, help and range; checked and listed from that.

What is wrong is a ``UserError`` that names the key.
"""

import dataclasses
import json
import textwrap
import types
import typing
from collections.abc import Iterable, Mapping
from typing import Any

from mlx_hmem.config import JsonConfig
from mlx_hmem.errors import UserError

ANYTHING = float("inf")
NEEDED = dataclasses.MISSING
NAMES = {
    int: "whole number",
    float: "number",
    bool: "true or false",
    str: "text",
    type(None): "null",
    Any: "value",
    dict[str, Any]: "mapping",
    tuple[int, ...]: "list of whole numbers",
    tuple[str, ...]: "list of texts",
    tuple[dict[str, Any], ...]: "list of mappings",
}
# What a list holds, and how one is written.
LISTS: dict[Any, tuple[type, str]] = {
    tuple[int, ...]: (int, "[16, 4]"),
    tuple[str, ...]: (str, "[TEXT, …]"),
    tuple[dict[str, Any], ...]: (dict, "[{KEY: VALUE}, …]"),
}


def key(default: Any, text: str, least: float = 0, most: float = ANYTHING) -> Any:
    """A dataclass field. ``default`` may be a class, whose defaults it then is; ``text`` helps;
    numbers, alone or in a list, lie within ``least`` and ``most``."""
    metadata = {"help": text, "least": least, "most": most}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def check_keys(section: Any, where: str) -> None:
    """Raises UserError unless numbers, texts, truth values and lists are such; ``where`` comes
    before their names. Numbers are listed one at least; a text is empty only by default."""
    hints = typing.get_type_hints(type(section))
    for each in dataclasses.fields(section):
        value, kinds = getattr(section, each.name), _kinds(hints[each.name])
        least, most = each.metadata.get("least", 0), each.metadata.get("most", ANYTHING)
        name = f"{where}{each.name}"
        if value is None and type(None) in kinds:
            continue
        if int in kinds:
            check_whole(name, value, least, most)
        elif float in kinds:
            if type(value) not in (int, float) or not least <= value <= most or value == ANYTHING:
                raise UserError(f"{name} is not a number in range", repr(value), _use(least, most))
        elif bool in kinds and type(value) is not bool:
            raise UserError(f"{name} is not true or false", repr(value), "use true or false")
        elif str in kinds and not (isinstance(value, str) and (value or each.default == "")):
            raise UserError(f"{name} is not a text", repr(value), "give a text")
        for hint in set(LISTS).intersection(kinds):
            kind, example = LISTS[hint]
            items = value if isinstance(value, tuple) else (None,)
            if not all(isinstance(item, kind) for item in items) or (kind is int and not items):
                raise UserError(f"{name} is not a {NAMES[hint]}", repr(value), f"use {example}")
            for item in items if kind is int else ():
                check_whole(name, item, least)


def check_whole(name: str, value: Any, least: float, most: float = ANYTHING) -> None:
    if type(value) is not int or not least <= value <= most:
        raise UserError(f"{name} is not a whole number", repr(value), _use(least, most))


def _use(least: float, most: float) -> str:
    return f"use {least} or more" if most == ANYTHING else f"use {least} to {most}"


def _kinds(hint: Any) -> tuple[Any, ...]:
    """The types of a key: those of a union, or the one."""
    return typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)


def section_of(hint: Any) -> type[JsonConfig] | None:
    """The section that a key of this type holds, if it holds one."""
    kinds = (k for k in _kinds(hint) if isinstance(k, type) and not typing.get_origin(k))
    return next((k for k in kinds if issubclass(k, JsonConfig)), None)


def help_text(recipe: type[JsonConfig], more: Mapping[str, type[JsonConfig]]) -> str:
    """Every key with its type, default and help, section by section; ``more`` are sections by name
    that no type says."""
    places: dict[type[JsonConfig], list[str]] = {recipe: []}
    lines = ["Keys of a recipe: type, default, what it is."]
    waiting = [recipe]
    for section in waiting:
        for name, hint in typing.get_type_hints(section).items():
            inner = section_of(hint)
            if inner is not None:
                if inner not in places:
                    waiting.append(inner)
                known = [f"{place}.{name}" for place in places[section]] or [name]
                places.setdefault(inner, []).extend(known)
    for section in waiting:
        lines += _section_lines(", ".join(places[section]), section)
    for title, section in more.items():
        lines += _section_lines(title, section)
    return "\n".join(lines)


def _section_lines(title: str, section: type[JsonConfig]) -> Iterable[str]:
    indent = "  " if title else ""
    yield f"\n{title}:" if title else ""
    hints = typing.get_type_hints(section)
    for each in dataclasses.fields(section):  # type: ignore[arg-type]
        kinds = [NAMES.get(kind, "section") for kind in _kinds(hints[each.name])]
        if each.default is not NEEDED:
            default = json.dumps(each.default)
        else:
            default = "needed" if each.default_factory is NEEDED else ""
        said = ", ".join(part for part in (" or ".join(kinds), default) if part)
        yield f"{indent}{each.name}: {said}"
        if text := each.metadata.get("help"):
            yield textwrap.fill(
                text, 79, initial_indent=indent + "    ", subsequent_indent=indent + "    "
            )

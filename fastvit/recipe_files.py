"""Recipes as TOML files and `key=value` texts, both ways and checked key by key."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args, get_type_hints

from fastvit.errors import RecipeError
from fastvit.recipes import SECTIONS, Recipe, section_of

if sys.version_info >= (3, 11):
    import tomllib
else:  # the same parser under its first name
    import tomli as tomllib

_WORDS = {"true": True, "false": False, "none": None}


def to_toml(recipe: Recipe) -> str:
    """The recipe as TOML, one section each; keys that are None are left out.

    Reading it back gives an equal recipe.
    """
    lines = [f"name = {_literal(recipe.name)}"]
    for name, kind in SECTIONS.items():
        lines += ["", f"[{name}]"]
        section = getattr(recipe, name)
        for key in (field.name for field in fields(kind)):
            value = getattr(section, key)
            if value is not None:
                lines.append(f"{key} = {_literal(value)}")
    return "\n".join(lines) + "\n"


def from_toml(text: str, source: str = "the recipe") -> Recipe:
    """The recipe that a TOML text describes; what it leaves out has its default.

    Raises:
        RecipeError: it is no TOML, has keys that no recipe has, or values that are
            of the wrong kind or out of bounds.
    """
    try:
        content = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(f"{source} is not TOML: {error}.") from error
    name = content.pop("name", "custom")
    values: dict[str, Any] = {}
    for section, rows in content.items():
        if section not in SECTIONS or not isinstance(rows, Mapping):
            raise RecipeError(
                f"{source} has {section!r}, which is no section of a recipe.",
                hint=f"Sections: {', '.join(SECTIONS)}.",
            )
        for key, value in rows.items():
            _check_place(source, section, key)
            values[key] = converted(key, value)
    return Recipe(name=str(name)).with_values(**values)


def read_recipe(path: str | os.PathLike[str]) -> Recipe:
    """The recipe in a TOML file.

    Raises:
        RecipeError: the file is missing or see `from_toml`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise RecipeError(
            f"{os.fspath(path)} cannot be read: {reason}.",
            hint="Check the path; a run's own recipe is recipe.toml in its folder.",
        ) from error
    return from_toml(text, os.fspath(path))


def with_settings(recipe: Recipe, texts: Sequence[str]) -> Recipe:
    """The recipe after `key=value` texts, in order.

    Raises:
        RecipeError: a text has another form, or see `converted` and `Recipe`.
    """
    values: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals:
            raise RecipeError(
                f"{text!r} is not key=value.", hint="Write it as in lr=0.002."
            )
        # `schedule.lr` is `lr`, said with its section.
        section, dot, key = key.strip().rpartition(".")
        if dot:
            _check_place(text, section, key)
        values[key] = converted(key, value.strip())
    return recipe.with_values(**values)


def converted(key: str, value: Any) -> Any:
    """A value, or a text of it, in the type that its key has.

    Raises:
        RecipeError: the key is not known, or the value is of another kind.
    """
    hint = get_type_hints(SECTIONS[section_of(key)])[key]
    kinds = get_args(hint) if type(None) in get_args(hint) else (hint,)
    if isinstance(value, str) and value.lower() in _WORDS and str not in kinds:
        value = _WORDS[value.lower()]
    for kind in kinds:
        found = _CONVERTERS.get(kind, _sequence)(value)
        if found is not NotImplemented:
            return found
    names = " or ".join(_NAMES.get(kind, "numbers") for kind in kinds)
    raise RecipeError(f"{key} is {value!r}, it must be {names}.")


def _check_place(source: str, section: str, key: str) -> None:
    right = section_of(key)
    if section != right:
        raise RecipeError(
            f"{source}: {key} is not in section {section!r}.",
            hint=f"It belongs to {right!r}.",
        )


def _boolean(value: Any) -> Any:
    return value if isinstance(value, bool) else NotImplemented


def _whole(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        return NotImplemented
    try:
        return int(value)
    except ValueError:
        return NotImplemented


def _number(value: Any) -> Any:
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return NotImplemented
    try:
        return float(value)
    except ValueError:
        return NotImplemented


def _text(value: Any) -> Any:
    return value if isinstance(value, str) else NotImplemented


def _nothing(value: Any) -> Any:
    return None if value is None else NotImplemented


def _sequence(value: Any) -> Any:
    parts = value.strip("[]()").split(",") if isinstance(value, str) else value
    if not isinstance(parts, Sequence):
        return NotImplemented
    numbers = tuple(_number(part) for part in parts)
    return NotImplemented if NotImplemented in numbers else numbers


_CONVERTERS = {
    bool: _boolean,
    int: _whole,
    float: _number,
    str: _text,
    type(None): _nothing,
}
_NAMES = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    type(None): "none",
}


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        escaped = value.replace("\\", "\\\\").replace('"', '\\"')
        return f'"{escaped}"'
    if isinstance(value, tuple):
        return f"[{', '.join(_literal(part) for part in value)}]"
    if isinstance(value, float):
        return repr(value)  # the shortest text that reads back as the same number
    return str(value)

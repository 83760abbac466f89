"""What is wrong with a value, where in it, and what should stand there?"""

import difflib
import re
from collections.abc import Iterable
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec
from msgspec import Meta, Struct

from gateway.settings.shape import Steps

Fault = tuple[Steps, str]
"""Where something is wrong, and what."""


def fault_in(value: Any, kind: Any, path: Steps) -> Fault | None:
    """The innermost part of *value* that is wrong by itself; None if the whole is a *kind*."""
    try:
        msgspec.convert(value, kind)
        return None
    except msgspec.ValidationError as exc:
        what = str(exc).partition(" - at `")[0]
    bare, description = _unwrapped(kind, value)
    for step, member, member_kind in _members(value, bare):
        if fault := fault_in(member, member_kind, (*path, step)):
            return fault
    if unknown := re.match(r"Object contains unknown field `(.*)`", what):
        known = sorted(field.encode_name for field in msgspec.structs.fields(bare))
        hint = near(unknown[1], known) or f"; known are: {', '.join(known)}"
        return (*path, unknown[1]), f"unknown key '{unknown[1]}'{hint}"
    if missing := re.match(r"Object missing required field `(.*)`", what):
        return path, f"'{missing[1]}' is missing"
    for key in value if isinstance(value, dict) else ():
        if not isinstance(key, str):
            return path, f"the key {key} is not text: put it in quotes"
    if description is not None and what.startswith("Expected"):
        return path, f"expected {description}"
    if get_origin(bare) is Literal:
        return path, f"expected one of {', '.join(get_args(bare))}"
    return path, _in_words(what)


def _in_words(what: str) -> str:
    """Such as "expected a number >= 0", for msgspec's "Expected `float` >= 0.0"."""
    said = re.sub(r"`(\w+)(?: \| (\w+))*`", lambda kinds: _kinds(kinds[0]), what)
    said = re.sub(r"\.0\b", "", said).replace(" of length >= 1", " with something in it")
    return f"{said[:1].lower()}{said[1:]}"


KINDS = {
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "bool": "true or false",
    "array": "a list",
    "object": "a mapping",
    "null": "nothing",
}


def _kinds(quoted: str) -> str:
    kinds = quoted.strip("`").removesuffix(" | null").split(" | ")
    return " or ".join(KINDS.get(kind, kind) for kind in kinds)


def _members(value: Any, kind: Any) -> list[tuple[str | int, Any, Any]]:
    """The members of *value* with their types, as far as *kind* says."""
    if isinstance(value, dict) and isinstance(kind, type) and issubclass(kind, Struct):
        kinds = get_type_hints(kind, include_extras=True)
        return [(name, member, kinds[name]) for name, member in value.items() if name in kinds]
    if isinstance(value, dict) and get_origin(kind) is dict:
        return [(name, member, get_args(kind)[1]) for name, member in value.items()]
    if isinstance(value, list) and get_origin(kind) is list:
        return [(index, item, get_args(kind)[0]) for index, item in enumerate(value)]
    return []


def _unwrapped(kind: Any, value: Any) -> tuple[Any, str | None]:
    """What *value* should be, of a type without `Annotated` and alternatives; and what that is in words."""
    description = None
    while get_origin(kind) not in (None, dict, list, Literal):
        described = [part.description for part in get_args(kind) if isinstance(part, Meta) and part.description]
        description = next(iter(described), description)
        kinds = [part for part in get_args(kind) if part is not NoneType and not isinstance(part, Meta)]
        kind = kinds[-1] if isinstance(value, dict) else kinds[0]  # a number, or an object that says more
    return kind, description


def near(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean '{close[0]}'?" if close else ""

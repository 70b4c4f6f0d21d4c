"""What a recipe's table may contain, read from the signature of the function that its keys are passed to."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from types import GenericAlias, NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import ConfigDict, StringConstraints, ValidationError, create_model

from metaoptim.core.brief import meant, nearest

NONE = "none"
"""What a recipe writes to leave out an option that may be absent, because TOML has no null."""

REQUIRED = inspect.Parameter.empty

CODE = Annotated[str, StringConstraints(pattern=":")]
"""A function of the user's own, as `code` finds it."""

_STRICT = ConfigDict(extra="forbid", strict=True, validate_default=True, allow_inf_nan=False)
_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    NoneType: json.dumps(NONE),
    CODE: "FILE.py:NAME",
    Any: "a value",
}


class ConfigError(ValueError):
    """Says in one sentence why a recipe can't be used."""


class Option(NamedTuple):
    """One key of a table; `default` is REQUIRED if the key must be given."""

    name: str
    type: Any
    default: Any
    meaning: str


def options(build: Callable[..., Any], *, keyword_only: bool = False) -> list[Option]:
    """The options of a function that TOML can express, from its signature and the Args of its docstring."""
    meanings = _meanings(inspect.getdoc(build) or "")
    return [
        Option(p.name, spelled, plain_default(p.default), meanings.get(p.name, ""))
        for p in inspect.signature(build, eval_str=True).parameters.values()
        if (p.kind is p.KEYWORD_ONLY or (p.kind is p.POSITIONAL_OR_KEYWORD and not keyword_only))
        and (spelled := toml_type(p.annotation))
    ]


def check(table: str, given: Mapping[str, Any], known: Sequence[Option], composed: Collection[str] = ()) -> dict[str, Any]:
    """The given values, with all defaults filled in. Errors: ConfigError for the first one that is wrong.

    composed: keys that are known where the algorithm is composed.
    """
    fields: dict[str, Any] = {o.name: (o.type, ... if o.default is REQUIRED else o.default) for o in known}
    absent = {o.name for o in known if NoneType in get_args(o.type) and given.get(o.name) == NONE}
    values = {k: None if k in absent else v for k, v in given.items()}
    try:
        return dict(create_model(table, __config__=_STRICT, **fields).model_validate(values))
    except ValidationError as error:
        # A mistyped key may also leave a required one missing; the typo is the one to report.
        problem = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
    key = str(problem["loc"][0])
    if problem["type"] == "extra_forbidden" and key in composed:
        raise ConfigError(f'unknown key `{key}` in [{table}]; `name = "compose"` takes it, with a rule.')
    if problem["type"] == "extra_forbidden":
        raise ConfigError(f"unknown key `{key}` in [{table}]{nearest(key, fields)}")
    expected, value = fields[key][0], values.get(key)
    if problem["type"] == "missing":
        raise ConfigError(f"missing key `{key}` in [{table}]; expected {spell(expected)}.")
    kinds = (expected, *get_args(expected))
    choices = [str(choice) for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]
    end = (meant(value, choices) if isinstance(value, str) else "") or "."
    raise ConfigError(f"`{key}` in [{table}]: found {found(value)}, expected {spell(expected)}{end}")


def spell(kind: Any) -> str:
    """A type in words."""
    origin, args = get_origin(kind), get_args(kind)
    if origin is Literal:
        return " or ".join(json.dumps(a) for a in args)
    if origin in (Union, UnionType):
        return " or ".join(spell(a) for a in args)
    if origin is list:
        return f"a list, each item {spell(args[0])}"
    return _WORDS.get(kind, "a table")


def found(value: Any) -> str:
    """A value as an error message shows it."""
    text = json.dumps(value, default=str, ensure_ascii=False)
    return f"the text {text}" if isinstance(value, str) else text


def plain_default(default: Any) -> Any:
    """A default as TOML would return it."""
    return [plain_default(v) for v in default] if isinstance(default, tuple) else default


def toml_type(hint: Any) -> Any:
    """The part of an annotation that TOML can express; None if there is none (a function, a module)."""
    origin, args = get_origin(hint), get_args(hint)
    if hint in (bool, int, float, str) or origin is Literal:
        return hint
    if origin in (Union, UnionType):
        kinds = [spelled for a in args if a is not NoneType and (spelled := toml_type(a))]
        return Union[(*kinds, *(a for a in args if a is NoneType))] if kinds else None
    if origin in (list, tuple, Sequence) and (item := toml_type(args[0])):
        return GenericAlias(list, item)
    if origin in (dict, Mapping) and (args[1] is Any or toml_type(args[1])):
        return dict[str, Any]
    return None


def _meanings(doc: str) -> dict[str, str]:
    """What the Args section of a docstring says about each argument."""
    meanings: dict[str, str] = {}
    name = ""
    for line in doc.partition("Args:\n")[2].splitlines():
        if not line.startswith("    "):
            break
        if entry := re.match(r" {4}(\w+): (.*)", line):
            name, text = entry.groups()
            meanings[name] = text.strip()
        elif name:
            meanings[name] += f" {line.strip()}"
    return meanings

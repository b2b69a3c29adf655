"""Texts of a command line and values of YAML as the type a setting has: converted by the type, never evaluated."""

from __future__ import annotations

import difflib
import types
import typing
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

TRUE, FALSE = ("true", "yes", "1", "on"), ("false", "no", "0", "off")


def nearest(name: str, allowed: typing.Iterable[str]) -> str:
    """``" (did you mean 'x'?)"`` for the allowed name closest to a misspelt one, else an empty string."""
    match = difflib.get_close_matches(name, list(allowed), n=1, cutoff=0.6)
    return f" (did you mean {match[0]!r}?)" if match else ""


def convert(key: str, value: Any, hint: Any) -> Any:
    """``value`` (text or a YAML value) as the type ``hint``."""
    if hint != bare(hint) and (value is None or (isinstance(value, str) and value.lower() in ("none", "null", ""))):
        return None
    hint = bare(hint)
    origin = get_origin(hint)
    if origin is list:
        items = value.split(",") if isinstance(value, str) else value
        if not isinstance(items, list):
            raise ValueError(f"{key} must be a list, not {value!r}")
        cleaned = [item.strip() if isinstance(item, str) else item for item in items]
        return [convert(key, item, get_args(hint)[0]) for item in cleaned if item != ""]
    if origin is dict:
        mapping = yaml.safe_load("{" + value.strip().strip("{}") + "}") if isinstance(value, str) else value
        if not isinstance(mapping, dict):
            raise ValueError(f"{key} must be a mapping such as {{task: 1.0}}, not {value!r}")
        return {str(name): convert(f"{key}.{name}", item, get_args(hint)[1]) for name, item in mapping.items()}
    if origin is Literal:
        if value not in get_args(hint):
            allowed = ", ".join(map(str, get_args(hint)))
            raise ValueError(f"{key} is {value!r}{nearest(str(value), map(str, get_args(hint)))}; allowed: {allowed}")
        return value
    return _scalar(key, value, hint)


def _scalar(key: str, value: Any, hint: Any) -> Any:
    if hint is Any:
        return value
    if hint is bool:
        if str(value).lower() not in TRUE + FALSE:
            raise ValueError(f"{key} must be true or false, not {value!r}")
        return str(value).lower() in TRUE
    if isinstance(value, (dict, list)) or value is None or (isinstance(value, bool) and hint is not str):
        raise ValueError(f"{key} must be {type_name(hint)}, not {value!r}")
    try:
        return hint(value) if hint is not int else _integer(value)
    except (TypeError, ValueError):
        raise ValueError(f"{key} must be {type_name(hint)}, not {value!r}") from None


def _integer(value: Any) -> int:
    number = int(value) if not isinstance(value, float) else value
    if number != int(number):
        raise ValueError(value)
    return int(number)


def bare(hint: Any) -> Any:
    """``X`` of ``X | None``."""
    if get_origin(hint) in (typing.Union, types.UnionType):
        return next(part for part in get_args(hint) if part is not type(None))
    return hint


def type_name(hint: Any) -> str:
    """A type in the words of a help text."""
    hint = bare(hint)
    if get_origin(hint) is Literal:
        return "|".join(map(str, get_args(hint)))
    if get_origin(hint) is list:
        return f"{type_name(get_args(hint)[0])},..."
    if get_origin(hint) is dict:
        return f"{{name: {type_name(get_args(hint)[1])}}}"
    return {Path: "path", Any: "value"}.get(hint) or hint.__name__

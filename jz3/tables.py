"""Frozen dataclasses from tables of TOML or JSON, every key and type checked."""

import dataclasses
import difflib
import types
import typing
from typing import Any


def from_table(cls: type[Any], table: dict[str, Any], where: str) -> Any:
    """Build the dataclass `cls` from a TOML table, checking every key and type."""
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in table:
        if key not in names:
            near = difflib.get_close_matches(key, names, 1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; known: {', '.join(names)}"
            raise ValueError(f"{where}: unknown key {key!r}{hint}")
    for f in dataclasses.fields(cls):
        if f.name not in table and f.default is f.default_factory is dataclasses.MISSING:
            raise ValueError(f"{where}: the key {f.name!r} is missing")
    values = {key: _convert(value, hints[key], f"{where}: {key}") for key, value in table.items()}
    try:
        return cls(**values)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if dataclasses.is_dataclass(hint) and isinstance(value, dict):
        return from_table(typing.cast(type, hint), value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_convert(v, arguments[0], f"{where}[{i}]") for i, v in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {k: _convert(v, arguments[1], f"{where}.{k}") for k, v in value.items()}
    if origin in (typing.Union, types.UnionType):
        return _convert(value, next(a for a in arguments if a is not type(None)), where)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if isinstance(hint, type) and isinstance(value, hint) and not (hint is int and isinstance(value, bool)):
        return value
    raise ValueError(f"{where}: must be {getattr(hint, '__name__', hint)}, got {value!r}")

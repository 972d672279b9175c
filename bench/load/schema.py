"""From YAML's mappings to frozen dataclasses; every error names the key.

A union of dataclasses is told apart by ``kind``, a class attribute of each. The name of a kind
alone stands for that kind with its defaults, and a number for the kind that has ``SHORT``, the
name of the field that it fills.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from deltaserve.errors import ConfigError

T = TypeVar("T")

NAMES: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    str: "text",
    bool: "true or false",
}


def build(cls: type[T], value: Any, where: str) -> T:
    """An instance of the dataclass ``cls``. Raises ConfigError, beginning with ``where``."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where} must be a mapping of keys to values, not {value!r}")
    hints = get_type_hints(cls)
    fields = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    given = {str(key).replace("-", "_"): each for key, each in value.items()}
    for name in given.keys() - fields - {"kind"}:
        raise ConfigError(f"{where}: unknown key {name!r}{did_you_mean(name, fields)}")
    converted = {
        name: convert(hints[name], each, f"{where}.{name}")
        for name, each in given.items()
        if name in fields
    }
    required = [f.name for f in dataclasses.fields(cls) if _required(f)]  # type: ignore[arg-type]
    if missing := [name for name in required if name not in converted]:
        raise ConfigError(f"{where}: {missing[0]} is missing")
    try:
        return cls(**converted)
    except ValueError as error:
        raise ConfigError(f"{where}: {error}") from error


def convert(wanted: Any, value: Any, where: str) -> Any:
    """``value`` as the type ``wanted``, of those that configurations use."""
    origin, args = get_origin(wanted), get_args(wanted)
    if origin in (Union, types.UnionType):
        return _convert_union(args, value, where)
    if origin is Literal:
        if value not in args:
            raise ConfigError(f"{where} is {value!r}, but must be one of {', '.join(args)}")
        return value
    if origin is tuple:
        return _convert_tuple(args, value, where)
    if dataclasses.is_dataclass(wanted):
        return build(wanted, value, where)  # type: ignore[arg-type]
    if wanted is float and type(value) is int:
        return float(value)
    if type(value) is not wanted:  # not isinstance: True is an int to Python, not to people
        raise ConfigError(f"{where} is {value!r}, but must be {NAMES[wanted]}")
    return value


def did_you_mean(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f"; did you mean {near[0]}?" if near else f" (known: {', '.join(sorted(known))})"


def positive(**values: float | None) -> None:
    """For ``__post_init__``: raises ValueError for a value that is not above 0."""
    for name, value in values.items():
        if value is not None and not 0 < value < float("inf"):
            raise ValueError(f"{name} is {value:g}, but must be above 0 and finite")


def not_negative(**values: float | None) -> None:
    for name, value in values.items():
        if value is not None and not 0 <= value < float("inf"):
            raise ValueError(f"{name} is {value:g}, but must be 0 or more")


def repeated(names: Iterable[str]) -> str | None:
    """The first that is there twice."""
    return next((name for name, count in Counter(names).items() if count > 1), None)


def _convert_tuple(args: tuple[Any, ...], value: Any, where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ConfigError(f"{where} is {value!r}, but must be a list")
    kinds = [args[0]] * len(value) if args[-1] is Ellipsis else list(args)
    if len(kinds) != len(value):
        raise ConfigError(f"{where} must have {len(kinds)} values, not {len(value)}")
    pairs = zip(kinds, value, strict=True)
    return tuple(convert(kind, each, f"{where}.{i}") for i, (kind, each) in enumerate(pairs))


def _convert_union(members: tuple[Any, ...], value: Any, where: str) -> Any:
    if value is None and types.NoneType in members:
        return None
    classes = [member for member in members if hasattr(member, "kind")]
    if classes:
        return _convert_tagged(classes, value, where)
    others = [member for member in members if member is not types.NoneType]
    if len(others) == 1:
        return convert(others[0], value, where)
    for member in others:
        try:
            return convert(member, value, where)
        except ConfigError:
            continue
    raise ConfigError(f"{where} is {value!r}, but must be {' or '.join(map(_describe, others))}")


def _convert_tagged(classes: list[Any], value: Any, where: str) -> Any:
    short = next((cls for cls in classes if hasattr(cls, "SHORT")), None)
    if short is not None and type(value) in (int, float):
        return build(short, {short.SHORT: value}, where)
    if isinstance(value, str):
        value = {"kind": value}
    if not isinstance(value, Mapping) or "kind" not in value:
        raise ConfigError(f"{where} is {value!r}, but must be a mapping with a kind")
    by_kind = {cls.kind: cls for cls in classes}
    if value["kind"] not in by_kind:
        kinds = ", ".join(by_kind)
        raise ConfigError(f"{where}.kind is {value['kind']!r}, but must be one of {kinds}")
    return build(by_kind[value["kind"]], value, where)


def _describe(wanted: Any) -> str:
    if get_origin(wanted) is Literal:
        return " or ".join(get_args(wanted))
    return NAMES.get(wanted, "a list")


def _required(field: dataclasses.Field[Any]) -> bool:
    missing = dataclasses.MISSING
    return field.default is missing and field.default_factory is missing

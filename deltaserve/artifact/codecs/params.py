"""Codec settings as frozen dataclasses, read from options, YAML or an untrusted manifest."""

from __future__ import annotations

import math
from dataclasses import fields
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar, get_origin, get_type_hints

from deltaserve.errors import CodecError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

P = TypeVar("P", bound="DataclassInstance")


def parse_params(cls: type[P], codec: str, params: dict[str, Any]) -> P:
    """Build ``cls`` from a mapping; missing fields take their defaults.

    Raises CodecError for unknown names, wrong types and what ``__post_init__`` refuses.
    """
    types = _types(cls)
    known = [f.name for f in fields(cls)]
    for name, value in params.items():
        if name not in known:
            fits = ", ".join(known) or "none"
            raise CodecError(f"codec {codec} has no setting {name!r} (it has: {fits})")
        if not _fits(value, types[name]):
            raise CodecError(f"codec {codec}: {name} must be {types[name].__name__}, not {value!r}")
    return cls(**params)


@cache
def _types(cls: type[Any]) -> dict[str, Any]:
    """Field types; resolving them anew would cost more than a small matmul, every step."""
    return get_type_hints(cls)


def one_of(codec: str, name: str, value: object, allowed: tuple[object, ...]) -> None:
    """Raises CodecError unless ``value`` is allowed."""
    if value not in allowed:
        choices = ", ".join(map(str, allowed))
        raise CodecError(f"codec {codec}: {name} must be one of {choices}, not {value}")


def at_least(codec: str, name: str, value: int, least: int) -> None:
    """Raises CodecError if ``value`` is below ``least``."""
    if value < least:
        raise CodecError(f"codec {codec}: {name} must be at least {least}, not {value}")


def _fits(value: object, kind: type) -> bool:
    if kind is float:
        real = isinstance(value, (int, float)) and not isinstance(value, bool)
        return real and math.isfinite(value)  # type: ignore[arg-type]
    # bool is an int to Python, not to a reader of YAML.
    kind = get_origin(kind) or kind
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))

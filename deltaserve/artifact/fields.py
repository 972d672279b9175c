"""Reading one field of ``delta.json``: the value in its type, or ArtifactError naming the field."""

from __future__ import annotations

import math
from typing import Any

from deltaserve.errors import ArtifactError

# No tensor of any model comes near; a hostile shape must not reach an allocation.
MAX_ELEMENTS = 1 << 40
MAX_DIMS = 8


def object_at(value: object, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArtifactError(f"delta.json: {where} is missing or not an object")
    return value


def text_at(holder: dict[str, Any], key: str, where: str) -> str:
    value = holder.get(key)
    if not isinstance(value, str) or not value:
        raise ArtifactError(f"delta.json: {where}{key} is missing or not a text")
    return value


def digest_at(holder: dict[str, Any], key: str, where: str) -> str:
    value = text_at(holder, key, where)
    hexes = value.removeprefix("sha256:")
    if hexes == value or len(hexes) != 64 or set(hexes) - set("0123456789abcdef"):
        raise ArtifactError(f"delta.json: {where}{key} is not a sha256 digest: {value[:80]!r}")
    return value


def count_at(holder: dict[str, Any], key: str, where: str) -> int:
    value = holder.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ArtifactError(f"delta.json: {where}{key} is not a number of bytes: {value!r}")
    return value


def shape_at(value: object, where: str) -> tuple[int, ...]:
    sane = isinstance(value, list) and len(value) <= MAX_DIMS
    if not sane or not all(type(n) is int and 0 <= n <= MAX_ELEMENTS for n in value):  # type: ignore[attr-defined]
        raise ArtifactError(f"delta.json: {where} is not a shape: {str(value)[:80]}")
    assert isinstance(value, list)
    if math.prod(value) > MAX_ELEMENTS:
        raise ArtifactError(f"delta.json: {where} is too large: {value}")
    return tuple(value)


def error_at(value: object, where: str) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < math.inf:
        raise ArtifactError(f"delta.json: {where} is not an error: {value!r}")
    return float(value)

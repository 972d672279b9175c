"""Operators that treat rows one by one, as functions from a list of rows to a list of rows.

A list is what one worker does at a time; results do not depend on where lists are cut.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from deltaserve.errors import PipelineError
from deltaserve.pipeline.operators import ELEMENT, OPERATORS
from deltaserve.pipeline.rows import Row, RowError, generator

Element = Callable[[list[Row]], list[Row]]
REGISTERED: dict[str, Callable[..., Any]] = {}


def register(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Let plans name a function: ``@register("clean")``, then ``.map("clean")``."""

    def keep(function: Callable[..., Any]) -> Callable[..., Any]:
        REGISTERED[name] = function
        return function

    return keep


def resolve(function: Callable[..., Any] | str) -> Callable[..., Any]:
    """The function that a plan holds: itself, a registered name, or "module:function".

    Raises PipelineError.
    """
    if callable(function):
        return function
    if function in REGISTERED:
        return REGISTERED[function]
    module, colon, name = function.partition(":")
    if not colon:
        known = ", ".join(sorted(REGISTERED)) or "none"
        raise PipelineError(f"no function {function!r} is registered (there are: {known})")
    try:
        found = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as cause:
        raise PipelineError(f"{function} cannot be imported: {cause}") from None
    if not callable(found):
        raise PipelineError(f"{function} is not a function")
    return found


def element(node: Any) -> Element:
    """What an element operator does. Raises PipelineError."""
    if node.op == "fused":
        return _Fused(node)
    if node.op == "chat_template":
        from deltaserve.pipeline.chat import ChatTemplate

        return ChatTemplate(node)
    if node.op == "tokenize":
        from deltaserve.pipeline.tokenizing import Tokenize

        return Tokenize(node)
    kinds: dict[str, Callable[[Any], Element]]
    kinds = {"map": _Map, "filter": _Filter, "flat_map": _FlatMap}
    return kinds[node.op](node)


def require_elements(plan: Any) -> None:
    """Raises PipelineError: a function, a tokenizer or its chat template is missing."""
    for node in plan.nodes():
        if OPERATORS[node.op].kind == ELEMENT and node.op != "cache":
            element(node)


class _Function:
    """A user's function, and the random numbers that it asked for."""

    def __init__(self, node: Any) -> None:
        self.name = node.name or node.op
        self.fn = resolve(node.params["fn"])
        self.random = node.attributes.random
        self.seed = node.params.get("seed", 0)

    def call(self, row: Row) -> Any:
        try:
            if self.random:
                return self.fn(row.value, generator(self.seed, row.key))
            return self.fn(row.value)
        except PipelineError:
            raise
        except Exception as cause:  # a user's function raises what it likes
            missing = f"no field {cause}" if isinstance(cause, KeyError) else str(cause)
            what = f"{type(cause).__name__}: {missing}"
            raise RowError(self.name, row.key, what) from cause


class _Map(_Function):
    def __call__(self, rows: list[Row]) -> list[Row]:
        return [self.mapped(row, self.call(row)) for row in rows]

    def mapped(self, row: Row, value: Any) -> Row:
        if not isinstance(value, Mapping):
            raise RowError(
                self.name,
                row.key,
                f"a map must return a mapping of fields, not a {type(value).__name__} (use filter "
                "to drop rows)",
            )
        return Row(row.key, value)


class _Filter(_Function):
    def __call__(self, rows: list[Row]) -> list[Row]:
        return [row for row in rows if self.call(row)]


class _Fused:
    """Maps and filters, all of them on a row before the next row."""

    def __init__(self, node: Any) -> None:
        self.steps = [(part.op == "map", _Map(part)) for part in node.params["parts"]]

    def __call__(self, rows: list[Row]) -> list[Row]:
        out = []
        for row in rows:
            for is_map, step in self.steps:
                made = step.call(row)
                if is_map:
                    row = step.mapped(row, made)
                elif not made:
                    break
            else:
                out.append(row)
        return out


class _FlatMap(_Function):
    def __call__(self, rows: list[Row]) -> list[Row]:
        out = []
        for row in rows:
            made = self.call(row)
            if isinstance(made, Mapping) or not hasattr(made, "__iter__"):
                raise RowError(self.name, row.key, "a flat_map must return a list of rows")
            try:
                values = list(made)  # a generator runs here
            except Exception as cause:
                if isinstance(cause, PipelineError):
                    raise
                what = f"{type(cause).__name__}: {cause}"
                raise RowError(self.name, row.key, what) from cause
            out += [Row((*row.key, number), value) for number, value in enumerate(values)]
        return out


def field_of(row: Row, name: str, operator: str) -> Any:
    """A field of a row. Raises PipelineError naming those that there are."""
    try:
        return row.value[name]
    except KeyError:
        has = ", ".join(map(str, row.value)) or "none"
        raise RowError(operator, row.key, f"no field {name!r}; its fields are {has}") from None


def takes_rng(function: Callable[..., Any]) -> bool:
    """Whether a function can be called as ``fn(row, rng)``."""
    try:
        inspect.signature(function).bind(None, None)
    except (TypeError, ValueError):
        return False
    return True

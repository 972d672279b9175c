"""A plan as people read it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from deltaserve.pipeline.node import Node


def tree(node: Node, indent: str) -> list[str]:
    """A line for each operator, those below it further in."""
    shown = ", ".join(
        f"{key}={_short(value)}" for key, value in node.params.items() if value is not None
    )
    name = f" [{node.name}]" if node.name and node.name != node.op else ""
    flags = " random" if node.attributes.random else ""
    flags += "" if node.attributes.deterministic else " nondeterministic"
    lines = [f"{indent}{node.op}({shown}){name}{flags}"]
    for below in node.inputs:
        lines += tree(below, indent + "  ")
    return lines


def _short(value: Any) -> str:
    if isinstance(value, tuple) and value and all(hasattr(each, "op") for each in value):
        return ", ".join(tree(each, "")[0] for each in value)
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

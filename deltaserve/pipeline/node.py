"""One operator of a plan, with all below it."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from deltaserve.pipeline.code import describe
from deltaserve.pipeline.operators import OPERATORS, Attributes

# Seeds decide the order, not the contents; how many texts a call takes, neither.
UNIDENTIFIED = ("seed", "together")


@dataclass(frozen=True, eq=False)
class Node:
    """One operator. ``name`` is unique within its plan."""

    op: str
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: tuple[Node, ...] = ()
    name: str = ""
    attributes: Attributes = field(default_factory=Attributes)

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", MappingProxyType(dict(self.params)))

    def fingerprint(self, *, seeds: bool = False) -> str:
        """A hash of this operator and all below it; names are left out."""
        shown = {k: v for k, v in self.params.items() if seeds or k not in UNIDENTIFIED}
        below = [node.fingerprint(seeds=seeds) for node in self.inputs]
        version = OPERATORS[self.op].version
        text = f"{self.op} {version} {describe(shown)} {self.attributes} {below}"
        return hashlib.sha256(text.encode()).hexdigest()


def node_of(
    op: str,
    params: Mapping[str, Any],
    inputs: tuple[Node, ...] = (),
    attributes: Attributes | None = None,
    name: str | None = None,
) -> Node:
    """An operator with the attributes of its kind unless it has its own.

    Raises PipelineError: a parameter that its kind does not take, or another number of inputs.
    """
    operator = OPERATORS[op]
    operator.require(params, len(inputs))
    return Node(op, params, inputs, name or "", attributes or operator.attributes)

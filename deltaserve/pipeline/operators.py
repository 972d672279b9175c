"""The operators that a plan may hold: what each demands, and what is true of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from deltaserve.errors import PipelineError


@dataclass(frozen=True)
class Attributes:
    """What an operator declares.

    deterministic: the same input gives the same output. random: it draws from the row's own
    generator (and is repeatable through it). order_free: it treats rows one by one. cost_hint:
    CPU seconds a row, if known.
    """

    deterministic: bool = True
    random: bool = False
    order_free: bool = False
    cost_hint: float | None = None


SOURCE, INDEX, ELEMENT, STREAM = "source", "index", "element", "stream"
Check = Callable[[Mapping[str, Any]], str | None]


@dataclass(frozen=True)
class Operator:
    """kind: a SOURCE reads rows by number; INDEX operators only change which numbers come when;
    ELEMENT operators treat rows one by one; STREAM operators need the rows in order.

    one_to_one: a row in is a row out. version: raised when results change, so that caches of
    older code are not used. check: says what is wrong with the parameters.
    """

    kind: str
    inputs: int = 1
    attributes: Attributes = Attributes()
    one_to_one: bool = True
    version: int = 1
    check: Check = lambda params: None
    many: bool = False

    def require(self, params: Mapping[str, Any], inputs: int) -> None:
        """Raises PipelineError: wrong parameters."""
        if self.many and inputs < 1:
            raise PipelineError("a mix or interleave needs at least one plan")
        if wrong := self.check(params):
            raise PipelineError(wrong)


def _positive(*names: str) -> Check:
    def check(params: Mapping[str, Any]) -> str | None:
        for name in names:
            value = params.get(name)
            if value is not None and value < 1:
                return f"{name} must be at least 1, not {value}"
        return None

    return check


def _one_of(name: str, *choices: str, then: Check = lambda params: None) -> Check:
    def check(params: Mapping[str, Any]) -> str | None:
        if params.get(name) not in choices:
            return f"{name} is {params.get(name)!r}: choose {' or '.join(choices)}"
        return then(params)

    return check


def _mix(params: Mapping[str, Any]) -> str | None:
    if params["stop"] not in ("all", "first"):
        return f"a mix stops at 'all' or 'first', not {params['stop']!r}"
    if any(not 0 < weight < float("inf") for weight in params["weights"]):
        return f"the weights of a mix must be positive numbers, not {params['weights']}"
    return None


def _bucket(params: Mapping[str, Any]) -> str | None:
    edges = params["boundaries"]
    if not edges or list(edges) != sorted(set(edges)) or edges[0] < 1:
        return f"bucket boundaries must be rising lengths, not {list(edges)}"
    return None


def _take(params: Mapping[str, Any]) -> str | None:
    return f"take needs 0 rows or more, not {params['n']}" if params["n"] < 0 else None


def _prefetch(params: Mapping[str, Any]) -> str | None:
    return f"prefetch needs 0 or more, not {params['n']}" if params["n"] < 0 else None


ROWWISE = Attributes(order_free=True)
PACK = _one_of(
    "algorithm",
    "best_fit",
    "first_fit",
    then=_one_of("overflow", "split", "truncate", "error", then=_positive("length", "window")),
)

OPERATORS = {
    "jsonl": Operator(SOURCE, 0, check=_one_of("on_error", "raise", "skip")),
    "parquet": Operator(SOURCE, 0),
    "dataset": Operator(SOURCE, 0),
    "text": Operator(SOURCE, 0, check=_one_of("by", "line", "file")),
    "tokens": Operator(SOURCE, 0, check=_positive("length")),
    "index": Operator(SOURCE),
    # The rows that a caller hands to open_pipeline: where a plan was split.
    "input": Operator(SOURCE, 0),
    "map": Operator(ELEMENT, attributes=ROWWISE),
    "filter": Operator(ELEMENT, attributes=ROWWISE, one_to_one=False),
    "flat_map": Operator(ELEMENT, attributes=ROWWISE, one_to_one=False),
    "chat_template": Operator(ELEMENT, attributes=ROWWISE),
    "tokenize": Operator(ELEMENT, attributes=ROWWISE),
    "fused": Operator(ELEMENT, attributes=ROWWISE, one_to_one=False),
    "cache": Operator(ELEMENT, attributes=ROWWISE),
    "shuffle": Operator(INDEX, version=2, check=_positive("window")),
    "repeat": Operator(INDEX, check=_positive("epochs")),
    "take": Operator(INDEX, check=_take),
    "mix": Operator(INDEX, check=_mix, many=True),
    "interleave": Operator(STREAM, check=_positive("block"), many=True),
    "prefetch": Operator(STREAM, check=_prefetch),
    "pack": Operator(STREAM, one_to_one=False, check=PACK),
    "bucket": Operator(STREAM, check=_bucket),
    "batch": Operator(STREAM, one_to_one=False, check=_positive("n", "pad_to")),
}

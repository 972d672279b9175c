"""What kind of elements flow where in a plan, and whether each operator can work on them.

Checked before anything runs, from what operators declare and from the first row of each source;
rows that differ from the first are told when they are read.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from deltaserve.errors import PipelineError
from deltaserve.pipeline.elements import resolve, takes_rng
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.operators import ELEMENT, OPERATORS, SOURCE
from deltaserve.pipeline.peek import first_row
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.segments import in_segment

ROW, PACKED, BATCH = "a row", "a packed row", "a batch"


@dataclass(frozen=True)
class Spec:
    """kind: ROW, PACKED or BATCH. fields: name -> kind of value; None: not known. endless:
    whether the stream has no end."""

    kind: str = ROW
    fields: dict[str, str] | None = None
    endless: bool = False

    def __str__(self) -> str:
        known = "unknown fields"
        if self.fields is not None:
            known = ", ".join(f"{name} ({kind})" for name, kind in self.fields.items())
        return f"{self.kind}: {known}" + (", without end" if self.endless else "")


def check(plan: Plan) -> Spec:
    """The spec of the elements. Raises PipelineError naming the operator that cannot work."""
    done: dict[int, Spec] = {}
    for node in plan.nodes():
        spec = _spec(node, [done[id(below)] for below in node.inputs])
        done[id(node)] = spec
        if node.op != "batch" and any(b.op == "bucket" for b in node.inputs):
            raise PipelineError(f"{_name(node)}: a batch must follow a bucket")
    if plan.root.op == "bucket":
        raise PipelineError(f"{_name(plan.root)}: a batch must follow a bucket")
    return done[id(plan.root)]


def _spec(node: Node, below: list[Spec]) -> Spec:
    if OPERATORS[node.op].kind == SOURCE:
        return below[0] if node.op == "index" else Spec(fields=_fields(first_row(node)))
    if len(below) > 1 or node.op in ("mix", "interleave"):
        return _joined(node, below)
    if OPERATORS[node.op].kind == ELEMENT:
        return ELEMENTS[node.op](node, below[0])
    return STREAMS.get(node.op, lambda node, spec: spec)(node, below[0])


def _joined(node: Node, below: list[Spec]) -> Spec:
    kinds = {spec.kind for spec in below}
    if len(kinds) > 1:
        raise PipelineError(f"{_name(node)}: its parts give {' and '.join(sorted(kinds))}")
    known = [set(spec.fields or ()) for spec in below]
    # Rows of different fields are legal (a map may make them alike), but nothing is known then.
    same = all(spec.fields is not None and set(spec.fields) == known[0] for spec in below)
    endless = any(spec.endless for spec in below)
    return Spec(below[0].kind, below[0].fields if same else None, endless)


def _function(node: Node, spec: Spec) -> Spec:
    function = resolve(node.params["fn"])
    if node.attributes.random and not takes_rng(function):
        raise PipelineError(
            f"{_name(node)}: a random function is called as fn(row, rng), which it does not take"
        )
    for field in node.params.get("reads") or ():
        _require(node, spec, field)
    if node.op == "filter":
        return spec
    written = node.params.get("writes")
    if written is None or spec.fields is None:
        return replace(spec, fields=None)
    return replace(spec, fields={**spec.fields, **dict.fromkeys(written, "any")})


def _chat_template(node: Node, spec: Spec) -> Spec:
    _require_kind(node, spec, ROW)
    _require(node, spec, node.params["messages"], "messages")
    fields = None if spec.fields is None else {**spec.fields, "text": "text", "spans": "any"}
    return replace(spec, fields=fields)


def _tokenize(node: Node, spec: Spec) -> Spec:
    _require_kind(node, spec, ROW)
    text = node.params["text"]
    _require(node, spec, text, "text")
    if spec.fields is None:
        return spec
    fields = {name: kind for name, kind in spec.fields.items() if name not in (text, "spans")}
    masked = {"loss_mask": "tokens"} if "spans" in spec.fields else {}
    return replace(spec, fields={**fields, "input_ids": "tokens", **masked})


def _cache(node: Node, spec: Spec) -> Spec:
    if not in_segment(node):
        raise PipelineError(
            f"{_name(node)}: a cache keeps rows of sources: it cannot stand above "
            f"{_first_stream(node)}"
        )
    for each in Plan(node).nodes():
        attributes = each.attributes
        if attributes.random or not attributes.deterministic:
            what = "draws at random" if attributes.random else "is not deterministic"
            raise PipelineError(
                f"{_name(node)}: {_name(each)} {what}, and a cache above it would repeat its "
                "first result for ever: put the cache below it"
            )
    return spec


def _shuffle(node: Node, spec: Spec) -> Spec:
    if node.params["window"] is None and spec.endless:
        raise PipelineError(f"{_name(node)}: what it would shuffle has no end: shuffle first")
    if node.params["window"] is None and not in_segment(node):
        raise PipelineError(
            f"{_name(node)}: above {_first_stream(node)} rows have no numbers: shuffle before "
            "it, or give a window"
        )
    return spec


def _repeat(node: Node, spec: Spec) -> Spec:
    if spec.endless:
        raise PipelineError(f"{_name(node)}: what it would repeat has no end already")
    return replace(spec, endless=node.params["epochs"] is None)


def _pack(node: Node, spec: Spec) -> Spec:
    _require_tokens(node, spec)
    names = ("input_ids", "position_ids", "segment_ids", "labels", "seq_lengths")
    return Spec(PACKED, dict.fromkeys(names, "tokens"), spec.endless)


def _bucket(node: Node, spec: Spec) -> Spec:
    _require_tokens(node, spec)
    return spec


def _batch(node: Node, spec: Spec) -> Spec:
    if spec.kind == BATCH:
        raise PipelineError(f"{_name(node)}: it would batch batches")
    if node.params["pad"] is not None:
        _require_tokens(node, spec)
        if spec.fields is not None:
            extra = dict.fromkeys(("labels", "attention_mask"), "tokens")
            kept = {k: v for k, v in spec.fields.items() if k != "loss_mask"}
            return Spec(BATCH, {**kept, **extra}, spec.endless)
    return replace(spec, kind=BATCH)


Rule = Callable[[Node, Spec], Spec]
ELEMENTS: dict[str, Rule] = {
    "map": _function,
    "filter": _function,
    "flat_map": _function,
    "chat_template": _chat_template,
    "tokenize": _tokenize,
    "cache": _cache,
    "fused": lambda node, spec: replace(spec, fields=None),
}
STREAMS: dict[str, Rule] = {
    "shuffle": _shuffle,
    "repeat": _repeat,
    "take": lambda node, spec: replace(spec, endless=False),
    "pack": _pack,
    "bucket": _bucket,
    "batch": _batch,
}


def _require_kind(node: Node, spec: Spec, kind: str) -> None:
    if spec.kind != kind:
        raise PipelineError(f"{_name(node)}: it works on {kind}, and gets {spec.kind}")


def _require_tokens(node: Node, spec: Spec) -> None:
    _require_kind(node, spec, ROW)
    _require(node, spec, "input_ids", "tokens")


def _require(node: Node, spec: Spec, field: str, kind: str | None = None) -> None:
    if spec.fields is None:
        return
    if field not in spec.fields:
        has = ", ".join(spec.fields) or "none"
        hint = " (tokenize first)" if field == "input_ids" else ""
        raise PipelineError(f"{_name(node)}: no field {field!r}; its rows have {has}{hint}")
    found = spec.fields[field]
    if kind and found not in (kind, "any"):
        raise PipelineError(f"{_name(node)}: the field {field!r} is {found}, not {kind}")


def _fields(row: Any) -> dict[str, str] | None:
    return None if row is None else {str(name): _kind(value) for name, value in row.items()}


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, (bool, int, float)):
        return "number"
    if isinstance(value, (list, tuple)) or hasattr(value, "dtype"):
        if len(value) and isinstance(value[0], dict):
            return "messages"
        return "tokens" if len(value) and not isinstance(value[0], (str, list)) else "any"
    return "any"


def _first_stream(node: Node) -> str:
    """The name of a lowest operator below that is not known by row number."""
    for each in Plan(node).nodes():
        if not in_segment(each):
            return _name(each)
    raise AssertionError("all of it is a segment")


def _name(node: Node) -> str:
    return node.name or node.op

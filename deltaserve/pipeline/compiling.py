"""From a plan to the stream that runs it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from deltaserve.pipeline import adapter
from deltaserve.pipeline.batching import Batch, Bucket
from deltaserve.pipeline.elements import element
from deltaserve.pipeline.joins import Interleave, Mix
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.operators import ELEMENT, OPERATORS, SOURCE
from deltaserve.pipeline.packing import Pack
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.segments import Probe, Work, in_segment
from deltaserve.pipeline.streams import (
    ElementStream,
    Repeat,
    SegmentStream,
    Stream,
    Take,
    WindowShuffle,
)


@dataclass
class Compiler:
    """``streams``: those of the segments, in the order of their numbers, as far as built.
    ``told``: notes of workers that the user has seen."""

    executor: adapter.Executor
    probe: Probe | None = None
    cache: Any = None
    streams: dict[int, SegmentStream] = field(default_factory=dict)
    told: set[str] = field(default_factory=set)

    def build(self, plan: Plan) -> Stream:
        """Raises PipelineError: a source, tokenizer or function is missing."""
        self._numbers = {leaf: at for at, (_, leaf) in enumerate(segment_roots(plan))}
        return self._build(plan.root, 0, 0)

    def _build(self, node: Node, leaf: int, epoch: int) -> Stream:
        """leaf: how many sources there are to the left of this."""
        if in_segment(node):
            return self._segment(node, leaf, epoch)
        stream = self._operator(node, leaf, epoch)
        if self.probe:
            stream.next = self.probe.wrap_next(node.name, stream.next)
        return stream

    def _segment(self, node: Node, leaf: int, epoch: int) -> Stream:
        work = Work(node, leaf, probe=self.probe, cache=self.cache)
        work.prepare()
        number = self._numbers[leaf]
        segment = adapter.Segment(work, number, epoch)
        stream = SegmentStream(segment, self.executor, self.probe, self.told)
        self.streams[number] = stream
        return stream

    def _operator(self, node: Node, leaf: int, epoch: int) -> Any:
        params, op = node.params, node.op
        if op == "repeat":
            below = node.inputs[0]
            return Repeat(lambda epoch: self._build(below, leaf, epoch), params["epochs"])
        children = []
        for below in node.inputs:
            children.append(self._build(below, leaf, epoch))
            leaf += leaf_count(below)
        child = children[0]
        if OPERATORS[op].kind == ELEMENT:
            return ElementStream(child, element(node))
        if op == "batch":
            return Batch(child, node.name, params)
        if op == "pack":
            return Pack(child, node.name, params)
        if op == "prefetch":
            return adapter.prefetch(child, params["n"]) if params["n"] else child
        if op == "take":
            return Take(child, params["n"])
        if op == "shuffle":
            return WindowShuffle(child, params["seed"], params["window"], epoch)
        if op == "mix":
            return Mix(children, params["weights"], params["seed"], params["stop"])
        if op == "interleave":
            return Interleave(children, params["block"])
        assert op == "bucket", op
        return Bucket(child, node.name, params["boundaries"], params["n"], params["window"])


def leaf_count(node: Node) -> int:
    """Sources below, each as often as it is used."""
    return sum(map(leaf_count, node.inputs)) if OPERATORS[node.op].kind != SOURCE else 1


def segment_roots(plan: Plan) -> list[tuple[Node, int]]:
    """The topmost nodes that workers share, from left to right, each with the number of sources
    to its left; a segment's number is its place here."""
    found: list[tuple[Node, int]] = []

    def visit(node: Node, leaf: int) -> int:
        if in_segment(node):
            found.append((node, leaf))
            return leaf + leaf_count(node)
        for below in node.inputs:
            leaf = visit(below, leaf)
        return leaf

    visit(plan.root, 0)
    return found


def segments(plan: Plan, *, probe: Probe | None = None, cache: Any = None) -> list[adapter.Segment]:
    """The parts of a plan that can be computed anywhere, list by list: what a remote worker
    opens. ``plan`` is a prepared one; see ``prepare``.

    Raises PipelineError: a source, tokenizer or function is missing.
    """
    return [
        adapter.Segment(Work(node, leaf, probe=probe, cache=cache), number)
        for number, (node, leaf) in enumerate(segment_roots(plan))
    ]

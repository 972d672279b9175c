"""What can be set of a plan's execution without changing its stream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from deltaserve.errors import PipelineError
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.operators import ELEMENT, OPERATORS, SOURCE
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.segments import in_segment
from deltaserve.pipeline.tuning.cacheplace import Nature


@dataclass(frozen=True)
class Settings:
    """threads: of each parallel stage; one that is not named gets 1. processes: of each stage,
    instead of threads, unless 0. prefetch: elements held ready at the root (None: as the plan
    has it). caches: operators behind which rows are kept on the disk."""

    threads: Mapping[str, int] = field(default_factory=dict)
    processes: int = 0
    prefetch: int | None = None
    caches: tuple[str, ...] = ()

    def workers(self, stage: str) -> int:
        return self.processes or self.threads.get(stage, 1)

    def same_workers(self, other: Settings, stages: Sequence[str]) -> bool:
        return bool(self.processes) == bool(other.processes) and all(
            self.workers(stage) == other.workers(stage) for stage in stages
        )

    def __str__(self) -> str:
        each = [f"{stage}: {threads} threads" for stage, threads in self.threads.items()]
        words = [f"{self.processes} processes"] if self.processes else each
        words += [f"prefetch {self.prefetch}"] if self.prefetch is not None else []
        words += [f"a cache behind {name}" for name in self.caches]
        return ", ".join(words)


def applied(plan: Plan, settings: Settings) -> Plan:
    """A prepared plan with the caches and the prefetch of ``settings``.

    Raises PipelineError: no such operator, or it is not one whose rows can be kept.
    """
    nodes = {node.name: node for node in plan.nodes()}
    for name in settings.caches:
        if name not in nodes or not can_keep(nodes[name]):
            able = ", ".join(n for n, node in nodes.items() if can_keep(node)) or "none"
            raise PipelineError(f"no cache can be put behind {name!r}; it can behind: {able}")
    done: dict[int, Node] = {}
    for node in plan.nodes():
        made = replace(node, inputs=tuple(done[id(below)] for below in node.inputs))
        if node.name in settings.caches:
            made = _above(made, "cache", {}, f"{node.name}-cache")
        done[id(node)] = made
    root = done[id(plan.root)]
    if settings.prefetch is not None:
        while root.op == "prefetch":
            root = root.inputs[0]
        if settings.prefetch and not in_segment(root):
            root = _above(root, "prefetch", {"n": settings.prefetch}, "prefetch")
    return Plan(root)


def _above(node: Node, op: str, params: Mapping[str, object], name: str) -> Node:
    return Node(op, params, (node,), name, OPERATORS[op].attributes)


def can_keep(node: Node) -> bool:
    """Whether a cache may stand behind this operator: it gives rows one by one."""
    return in_segment(node) and OPERATORS[node.op].kind in (SOURCE, ELEMENT) and node.op != "cache"


def epochs(plan: Plan) -> float:
    """How often a plan reads its rows."""
    times = 1.0
    for node in plan.nodes():
        if node.op == "repeat":
            times *= node.params["epochs"] or float("inf")
    return times


def natures(plan: Plan, rows: Mapping[str, int], kept: Mapping[str, float]) -> dict[str, Nature]:
    """What the plan declares of its operators, for the placement of caches; rows: of each
    source; kept: bytes of a cache behind an operator, where known. Shuffles and repeats in a
    segment only order row numbers, so a cache below or above them is the same."""
    return {
        node.name: Nature(
            tuple(below.name for below in measured_inputs(node)),
            random=node.attributes.random,
            deterministic=node.attributes.deterministic,
            reorders=not can_keep(node),
            rows=rows.get(node.name),
            bytes=kept.get(node.name),
        )
        for node in measured_nodes(plan)
    }


def measured_nodes(plan: Plan) -> list[Node]:
    """Operators that do something as rows pass, inputs first. What only orders the rows of a
    segment (shuffle, repeat, mix, ...) is arithmetic on their numbers, and costs nothing."""
    below_index = {id(i) for n in plan.nodes() if n.op == "index" for i in n.inputs}
    return [n for n in plan.nodes() if is_measured(n) and id(n) not in below_index]


def measured_inputs(node: Node) -> list[Node]:
    if OPERATORS[node.op].kind == SOURCE:  # an index reads its source itself
        return []
    found: list[Node] = []
    for below in node.inputs:
        found += [below] if is_measured(below) else measured_inputs(below)
    return found


def is_measured(node: Node) -> bool:
    if node.op == "prefetch":  # its thread does the work of what is below, and waits for it
        return False
    return OPERATORS[node.op].kind in (SOURCE, ELEMENT) or not in_segment(node)

"""A plan under measurement: runs it with the recorder, and makes the trace that tuning reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from deltaserve.pipeline.adapter import LocalExecutor, Segment
from deltaserve.pipeline.consumption import Consumption
from deltaserve.pipeline.iterator import open_pipeline
from deltaserve.pipeline.operators import ELEMENT, OPERATORS, SOURCE
from deltaserve.pipeline.plan import Node, Plan
from deltaserve.pipeline.segments import Done, in_segment
from deltaserve.pipeline.trace import OperatorFigures, Trace
from deltaserve.pipeline.tracing import Recorder, make_trace
from deltaserve.pipeline.tuning.cacheplace import Nature

ROWS = "rows"
"""The stage that workers share: sources and what treats rows one by one. All else is the
consumer's own thread."""
CONSUMER = "consumer"


class _Watched(LocalExecutor):
    """Waiting for workers is no operator's own time."""

    def __init__(self, recorder: Recorder, threads: int, processes: int) -> None:
        super().__init__(threads, processes)
        self._probe = recorder.waiting()

    def open(self, segment: Segment, first: int) -> Iterator[Done]:
        lists: Any = super().open(segment, first)
        try:
            while True:
                self._probe.begin()
                try:
                    done = next(lists, None)
                finally:
                    self._probe.end(None, made=0)
                if done is None:
                    return
                yield done
        finally:
            lists.close()


class Profiled:
    """An iterator over a plan that is recorded (``tune.Traced``).

    Caches that the plan has are used as always: to see what they save, profile twice.
    """

    def __init__(
        self, plan: Plan, threads: int = 0, processes: int = 0, cache: Path | None = None
    ) -> None:
        """Raises PipelineError: see ``open_pipeline``."""
        self._recorder = Recorder()
        self._executor = _Watched(self._recorder, threads, processes)
        self._elements = open_pipeline(
            plan, executor=self._executor, probe=self._recorder, cache=cache
        )
        self._consumed = Consumption()

    def __next__(self) -> Any:
        self._consumed.asked()
        element = next(self._elements)
        self._consumed.given()
        return element

    def trace(self) -> Trace:
        workers = self._executor.processes or self._executor.threads
        bases = [
            OperatorFigures(
                node.name,
                node.op,
                tuple(below.name for below in measured_inputs(node)),
                stage=ROWS if in_segment(node) else CONSUMER,
                serial=not in_segment(node),
                parallelism=max(1, workers) if in_segment(node) else 1,
            )
            for node in measured_nodes(self._elements.plan)
        ]
        return make_trace(
            bases,
            [self._recorder.totals()],
            self._consumed,
            threads=max(1, self._executor.threads),
            processes=self._executor.processes,
        )

    def close(self) -> None:
        self._elements.close()


def measured_nodes(plan: Plan) -> list[Node]:
    """Operators that do something as rows pass, inputs first. What only orders the rows of a
    segment (shuffle, repeat, mix, ...) is arithmetic on their numbers, and costs nothing."""
    return [node for node in plan.nodes() if _is_measured(node)]


def measured_inputs(node: Node) -> list[Node]:
    found: list[Node] = []
    for below in node.inputs:
        found += [below] if _is_measured(below) else measured_inputs(below)
    return found


def natures(plan: Plan) -> Mapping[str, Nature]:
    """What the plan declares of its operators, for the placement of caches."""
    return {
        node.name: Nature(
            tuple(below.name for below in measured_inputs(node)),
            random=node.attributes.random,
            deterministic=node.attributes.deterministic,
            reorders=OPERATORS[node.op].kind not in (SOURCE, ELEMENT),
        )
        for node in measured_nodes(plan)
    }


def _is_measured(node: Node) -> bool:
    if node.op == "prefetch":  # its thread does the work of what is below, and waits for it
        return False
    return OPERATORS[node.op].kind in (SOURCE, ELEMENT) or not in_segment(node)

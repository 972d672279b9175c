"""A plan that runs under the recorder: its trace can be asked for, its threads changed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from deltaserve.pipeline.adapter import LocalExecutor, Segment
from deltaserve.pipeline.cache import settings_of
from deltaserve.pipeline.compiling import segment_roots
from deltaserve.pipeline.consumption import Consumption
from deltaserve.pipeline.iterator import Pipeline, prepare, stream_fingerprint
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.segments import CHUNK, Done, in_segment
from deltaserve.pipeline.trace import OperatorFigures, Trace
from deltaserve.pipeline.tracing import Recorder, make_trace
from deltaserve.pipeline.tuning.settings import (
    Settings,
    applied,
    is_measured,
    measured_inputs,
    measured_nodes,
)

ROWS = "rows"
"""The stage of a plan's only segment: sources and what treats rows one by one, shared by
workers. Where there are several, each is called after its last operator."""
DEFAULT = Settings()
CONSUMER = "consumer"
"""Streams above them, in one thread: the consumer's, or the prefetching one at the root."""


class StageExecutor:
    """Each segment with workers of its own (an `adapter.Executor`)."""

    def __init__(self, plan: Plan, settings: Settings, recorder: Recorder | None) -> None:
        self.names = segment_names(plan)
        self._tops = {stage: name for name, stage in _tops(plan)}
        self.handed: Counter[str] = Counter()
        self._lists: Counter[str] = Counter()
        self._recorder = recorder
        self._each = {
            name: LocalExecutor(
                0 if settings.processes else settings.workers(name), settings.processes
            )
            for name in self.names
        }

    def open(self, segment: Segment, first: int) -> Iterator[Done]:
        name = self.names[segment.number]
        lists = self._each[name].open(segment, first)
        return self._watched(name, lists) if self._recorder else lists

    def resize(self, stage: str, threads: int) -> None:
        self._each[stage].resize(threads)

    def workers(self, stage: str) -> int:
        each = self._each[stage]
        return max(1, each.processes or each.threads)

    def buffer(self, stage: str) -> int:
        return self.workers(stage) * self._each[stage].buffer

    def settled(self) -> bool:
        """Whether all workers' buffers hold what they hold while the plan runs on: what was made
        before anybody asked is handed on, or the buffer is full."""
        return all(
            max(self._lists[name], self._each[name].ready()) >= self.buffer(name)
            for name in self.names
        )

    def close(self) -> None:
        for each in self._each.values():
            each.close()

    def _watched(self, name: str, lists: Any) -> Iterator[Done]:
        """Waiting for workers is no operator's own time; and what was made ahead is not handed
        on yet."""
        assert self._recorder is not None
        idle, probe = self._recorder.waiting(), self._recorder.operator(self._tops.get(name, name))
        try:
            while True:
                probe.look(self._each[name].ready())
                idle.begin()
                try:
                    done = next(lists, None)
                finally:
                    idle.end(None, made=0)
                if done is None:
                    return
                self.handed[name] += len(done.rows)
                self._lists[name] += 1
                yield done
        finally:
            lists.close()


class Profiled:
    """An iterator over a plan that is recorded (``tune.Traced``, ``online.Adjustable``).

    Neither settings nor the recorder change the stream or its states.
    """

    def __init__(
        self,
        plan: Plan,
        settings: Settings = DEFAULT,
        *,
        cache: Any = None,
        rewrites: bool = True,
        record: bool = True,
    ) -> None:
        """Raises PipelineError: see ``open_pipeline`` and ``applied``."""
        self.plan = applied(prepare(plan, rewrites=rewrites), settings)
        self._settings = settings
        self._recorder = Recorder() if record else None
        self._executor = StageExecutor(self.plan, settings, self._recorder)
        self._elements = Pipeline(
            self.plan, stream_fingerprint(plan), self._executor, self._recorder, settings_of(cache)
        )
        self._stages = stages(self.plan)
        self.consumed = Consumption()

    def __iter__(self) -> Profiled:
        return self

    def __next__(self) -> Any:
        self.consumed.asked()
        element = next(self._elements)
        self.consumed.given()
        return element

    def settled(self) -> bool:
        """Whether the rate of elements is that of making them; known with a recorder."""
        return self._executor.settled()

    @property
    def skipped(self) -> int:
        return self._elements.skipped

    def get_state(self) -> dict[str, Any]:
        return self._elements.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._elements.set_state(state)

    def set_parallelism(self, stage: str, threads: int) -> None:
        self._executor.resize(stage, threads)

    def threads(self) -> dict[str, int]:
        return {name: self._executor.workers(name) for name in self._executor.names}

    def trace(self) -> Trace:
        assert self._recorder is not None, "opened without a recorder"
        tops = dict(_tops(self.plan))
        return make_trace(
            [self._base(node, tops.get(node.name)) for node in measured_nodes(self.plan)],
            [self._recorder.totals()],
            self.consumed,
            threads=max(self.threads().values(), default=1),
            processes=self._settings.processes,
        )

    def _base(self, node: Node, top: str | None) -> OperatorFigures:
        stage, shared = self._stages[node.name], in_segment(node)
        return OperatorFigures(
            node.name,
            node.op,
            tuple(below.name for below in measured_inputs(node)),
            stage=stage,
            serial=not shared,
            parallelism=self._executor.workers(stage) if shared else 1,
            buffer=self._executor.buffer(top) if top else 0,
            handed=self._executor.handed[top] if top else None,
            lot=CHUNK if shared else 1,
        )

    def close(self) -> None:
        self._elements.close()


def _tops(plan: Plan) -> Iterator[tuple[str, str]]:
    """The operator that makes all rows which a segment hands on, and the segment's stage."""
    for (root, _), stage in zip(segment_roots(plan), segment_names(plan), strict=True):
        found = [root] if is_measured(root) else measured_inputs(root)
        if len(found) == 1:
            yield found[0].name, stage


def segment_names(plan: Plan) -> list[str]:
    """Of a prepared plan's segments, by number."""
    roots = [node.name for node, _ in segment_roots(plan)]
    return [ROWS] if len(roots) == 1 else roots


def stages(plan: Plan) -> dict[str, str]:
    """Of a prepared plan's operators: those of one stage are run by the same threads."""
    names = {
        id(node): name
        for (node, _), name in zip(segment_roots(plan), segment_names(plan), strict=True)
    }
    found: dict[str, str] = {}

    def visit(node: Node, stage: str) -> None:
        stage = names.get(id(node), stage)
        found.setdefault(node.name, stage)
        # A prefetch below others has a thread of its own.
        below = node.name if node.op == "prefetch" and node is not plan.root else stage
        for each in node.inputs:
            visit(each, below)

    visit(plan.root, CONSUMER)
    return found

"""A pipeline of plain functions in threads, to plant costs in: every stage has its own threads.

Order is kept, threads can be changed while it runs, and the recorder sees every call. It has
no plan and no state; what is proved on it is the tracing and the tuning.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from deltaserve.pipeline.consumption import Consumption
from deltaserve.pipeline.trace import OperatorFigures, Trace
from deltaserve.pipeline.tracing import Recorder, make_trace

DONE = object()
DROPPED = object()
SOURCE = "source"


@dataclass(frozen=True)
class Step:
    """work: element -> element, or DROPPED. A serial step runs in its consumer's thread and
    gets an iterator of elements instead, as packing and batching do."""

    name: str
    work: Callable[..., Any]
    serial: bool = False
    random: bool = False


class _Parallel:
    """Threads that take from ``upstream`` one at a time and hand on in order."""

    def __init__(
        self, step: Step, upstream: Iterator[Any], threads: int, recorder: Recorder | None
    ):
        self.step, self.upstream = step, upstream
        self.probe = recorder.operator(step.name) if recorder else None
        self.idle = recorder.waiting() if recorder else None
        self.target, self.ended = 0, False
        self.error: BaseException | None = None
        self.taking, self.state = threading.Lock(), threading.Condition()
        self.ready: dict[int, Any] = {}
        self.next_in = self.next_out = 0
        self.resize(threads)

    def resize(self, threads: int) -> None:
        with self.state:
            before, self.target = self.target, threads
            self.state.notify_all()
        for index in range(before, threads):
            threading.Thread(target=self._run, args=(index,), daemon=True).start()

    def _room(self) -> bool:
        return self.next_in - self.next_out < 2 * self.target + 2

    def _run(self, index: int) -> None:
        while True:
            with self.state:
                self.state.wait_for(lambda: self._room() or self.ended or index >= self.target)
                if self.ended or index >= self.target:
                    return
            try:
                with self.taking:
                    if self.ended:
                        return
                    element = next(self.upstream, DONE)
                    ticket, self.next_in = self.next_in, self.next_in + 1
                made = element if element is DONE else self._work(element)
            except BaseException as error:  # handed to the consumer
                self.error, made = error, DONE
            with self.state:
                self.ended = self.ended or made is DONE
                self.ready[ticket] = made
                self.state.notify_all()

    def _work(self, element: Any) -> Any:
        if self.probe is None:
            return self.step.work(element)
        self.probe.begin()
        made = DROPPED
        try:
            made = self.step.work(element)
        finally:
            kept = made is not DROPPED
            self.probe.end(made if kept else None, made=int(kept), taken=1)
        return made

    def __iter__(self) -> Iterator[Any]:
        while True:
            if self.probe is not None and self.idle is not None:
                self.probe.look(len(self.ready))
                self.idle.begin()
            with self.state:
                self.state.wait_for(lambda: self.next_out in self.ready)
                made = self.ready.pop(self.next_out)
                self.next_out += 1
                self.state.notify_all()
            if self.idle is not None:
                self.idle.end()
            if self.error is not None:
                raise self.error
            if made is DONE:
                return
            if made is not DROPPED:
                yield made

    def stop(self) -> None:
        with self.state:
            self.ended = True
            self.state.notify_all()


class Staged:
    """Runs steps over a source; ``threads`` by step name (1 where none is given)."""

    def __init__(
        self,
        source: Callable[[], Iterator[Any]],
        steps: Sequence[Step],
        threads: Mapping[str, int] | None = None,
        recorder: Recorder | None = None,
    ) -> None:
        self.steps, self.recorder = steps, recorder
        self.consumed = Consumption()
        self.parallel: dict[str, _Parallel] = {}
        stream = self._traced(SOURCE, source())
        for step in steps:
            if step.serial:
                stream = self._traced(step.name, step.work(stream))
            else:
                wanted = (threads or {}).get(step.name, 1)
                self.parallel[step.name] = _Parallel(step, stream, wanted, recorder)
                stream = iter(self.parallel[step.name])
        self._stream = stream

    def _traced(self, name: str, stream: Iterator[Any]) -> Iterator[Any]:
        return stream if self.recorder is None else _recorded(stream, self.recorder.operator(name))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        self.consumed.asked()
        element = next(self._stream)
        self.consumed.given()
        return element

    def set_parallelism(self, name: str, threads: int) -> None:
        self.parallel[name].resize(threads)

    def threads(self) -> dict[str, int]:
        return {name: each.target for name, each in self.parallel.items()}

    def close(self) -> None:
        for each in self.parallel.values():
            each.stop()

    def trace(self) -> Trace:
        assert self.recorder is not None
        return make_trace(self.bases(), [self.recorder.totals()], self.consumed)

    def bases(self) -> list[OperatorFigures]:
        """The source runs in one thread at a time; a serial step in its consumer's."""
        found = [OperatorFigures(SOURCE, SOURCE, stage=SOURCE, serial=True)]
        stage = SOURCE
        for step in self.steps:
            before = (found[-1].name,)
            if not step.serial or not found[-1].serial:
                stage = step.name
            lanes = self.parallel[step.name].target if not step.serial else 1
            found.append(
                OperatorFigures(step.name, "map", before, stage, step.serial, lanes, 2 * lanes + 2)
            )
        return found


def _recorded(stream: Iterator[Any], probe: Any) -> Iterator[Any]:
    while True:
        probe.begin()
        element = DONE
        try:
            element = next(stream, DONE)
        finally:
            probe.end(None if element is DONE else element, made=int(element is not DONE))
        if element is DONE:
            return
        yield element

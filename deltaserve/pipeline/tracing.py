"""Records what operators cost while a pipeline runs, in all its threads.

An operator's clocks stop while it calls its inputs, so times are its own. Reading three clocks
takes 1 to 3 us, more than some operators need: of all outermost calls of a thread only a random
few are timed, as many as keep the clocks under ``SHARE`` of the time; all are counted, and
`figures` scales. How many that is follows from the time between all calls, timed or not: a
thread's calls may take 50 us and 500 ms by turns, and who goes by the quick ones skips the slow
ones. The first call of each operator is always timed. Totals live in memory until they are asked
for, so no last part is lost.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from deltaserve.pipeline.clocks import Clock, Reading
from deltaserve.pipeline.consumption import Consumption, resident_bytes, usable_cores
from deltaserve.pipeline.trace import OperatorFigures, Trace, merge

SHARE = 0.004
MOST_SKIPPED = 1000
MADE, TAKEN, CALLS, TIMED, WEIGHT, WALL, CPU, QUEUED, BYTES, SIZED, READ, HELD, LOOKS = range(13)
"""Of an operator's totals. WALL, CPU, QUEUED: of TIMED calls, each weighted by the calls that it
stands for (WEIGHT); BYTES: of SIZED elements; HELD: sum of queue lengths at LOOKS."""
WIDTH = 13
# What timing one call costs, in readings of the clocks: three of them, and the bookkeeping.
READS = 5
Totals = dict[str, list[float]]


@dataclass
class _Frame:
    """A timed call that is under way: since when its own clocks run, and what they have."""

    since: Reading
    wall: int = 0
    cpu: int = 0
    queued: int = 0
    children: int = 0


class _Thread:
    """Totals and open calls of one thread; only that thread writes here."""

    def __init__(self, seed: int) -> None:
        self.clock = Clock()
        self.random = random.Random(seed)
        self.totals: dict[str, list[float]] = {}
        self.depth = 0
        self.frames: list[_Frame] = []
        self.timing = False
        self.calls = 0
        self.skip = 0
        self.weight = 0
        self.plans, self.mean_ns = 0, 0.0
        self.cost_ns, self.child_ns = 0.0, 0.0
        self.planned = time.perf_counter_ns()

    def of(self, name: str) -> list[float]:
        found = self.totals.get(name)
        if found is None:
            found = self.totals[name] = [0.0] * WIDTH
        return found


class Recorder:
    """The tracer of one process. ``operator(name)`` gives the probe of an operator.

    It is a `segments.Probe`: what is sent to a worker process arrives empty, and what that one
    ``collect``s is ``merge``d here.
    """

    def __init__(self, share: float = SHARE, *, remote: bool = False) -> None:
        self.share, self._remote = share, remote
        self._local = threading.local()
        self._threads: list[_Thread] = []
        self._merged: Totals = {}
        self._collected: Totals = {}
        self._lock = threading.Lock()
        self._cost_ns, self._child_ns = _overhead()

    def __reduce__(self) -> tuple[Callable[..., Recorder], tuple[float]]:
        return _remote_recorder, (self.share,)

    def wrap(self, name: str, call: Callable[[Any], Any]) -> Callable[[Any], Any]:
        """Around what an operator does to a list. A source is a bound ``read`` whose object
        counts ``bytes_read``."""
        probe, source = self.operator(name), getattr(call, "__self__", None)
        counter = _Counter(source) if hasattr(source, "bytes_read") else None

        def timed(rows: Any) -> Any:
            probe.begin()
            made: Sequence[Any] = ()
            try:
                result = call(rows)
                # What a cache keeps comes with the number of rows that were skipped.
                made = result[0] if type(result) is tuple else result
                return result
            finally:
                if counter is not None:
                    probe.read(counter.moved())
                sample = made[len(made) // 2] if made else None
                probe.end(getattr(sample, "value", sample), made=len(made), taken=len(rows))

        return timed

    def wrap_next(self, name: str, call: Callable[[], Any]) -> Callable[[], Any]:
        """Around how a stream gives its next row; the end of the stream is no row."""
        probe = self.operator(name)

        def timed() -> Any:
            probe.begin()
            row = None
            try:
                row = call()
                return row
            finally:
                probe.end(getattr(row, "value", None), made=int(row is not None))

        return timed

    def collect(self) -> Totals | None:
        """What was measured since the last call; None where the consumer reads it itself."""
        if not self._remote:
            return None
        now = self.totals()
        moved = {name: _sum(each, self._collected.get(name), -1) for name, each in now.items()}
        self._collected = now
        return moved

    def merge(self, measured: Totals) -> None:
        with self._lock:
            _add(self._merged, measured)

    def operator(self, name: str) -> Probe:
        return Probe(name, self)

    def waiting(self) -> Probe:
        """The probe around waiting for another stage's queue: nobody's own time."""
        return Probe("", self)

    def thread(self) -> _Thread:
        try:
            return self._local.thread
        except AttributeError:
            with self._lock:
                found = self._local.thread = _Thread(len(self._threads))
                self._threads.append(found)
            found.cost_ns, found.child_ns = self._cost_ns, self._child_ns
            return found

    def totals(self) -> Totals:
        """Sums over threads and what was merged, by operator."""
        with self._lock:
            threads = list(self._threads)
            sums = {name: list(values) for name, values in self._merged.items()}
        for thread in threads:
            _add(sums, dict(thread.totals))
        return sums


def _remote_recorder(share: float) -> Recorder:
    return Recorder(share, remote=True)


def _add(sums: Totals, more: Totals) -> None:
    for name, values in more.items():
        sums[name] = _sum(values, sums.get(name))


def _sum(values: list[float], others: list[float] | None, sign: int = 1) -> list[float]:
    """values + sign * others."""
    if others is None:
        return list(values)
    return [a + sign * b for a, b in zip(values, others, strict=True)]


class _Counter:
    """How far a source's ``bytes_read`` moved since the last look, of whichever thread."""

    def __init__(self, source: Any) -> None:
        self._source, self._seen, self._lock = source, 0, threading.Lock()

    def moved(self) -> int:
        with self._lock:
            now = self._source.bytes_read
            moved, self._seen = now - self._seen, now
            return moved


class Probe:
    """Of one operator: ``begin`` and ``end`` around each of its calls, in any thread."""

    __slots__ = ("_recorder", "name")

    def __init__(self, name: str, recorder: Recorder) -> None:
        self.name, self._recorder = name, recorder

    def begin(self) -> None:
        thread = self._recorder.thread()
        thread.depth += 1
        if thread.depth == 1:
            known = thread.totals.get(self.name)
            thread.timing = thread.skip <= 0 or known is None or not known[CALLS]
            thread.calls += 1
            thread.skip -= 1
            # A timed call stands for those skipped before it: the first, often slow, for itself.
            thread.weight += 1
        if not thread.timing:
            return
        now = thread.clock.read()
        if thread.frames:
            outer = thread.frames[-1]
            _charge(outer, now)
            outer.children += 1
        thread.frames.append(_Frame(now))

    def end(self, value: Any = None, *, made: int = 1, taken: int = 0) -> None:
        """The call made so many elements (``value`` the last, if it is to be sized) and took so
        many from the inputs."""
        thread = self._recorder.thread()
        totals = thread.totals.get(self.name) or thread.of(self.name)
        totals[MADE] += made
        totals[TAKEN] += taken
        totals[CALLS] += 1
        thread.depth -= 1
        if not thread.timing:
            return
        now = thread.clock.read()
        frame = thread.frames.pop()
        _charge(frame, now)
        own = thread.cost_ns + frame.children * thread.child_ns
        totals[TIMED] += 1
        totals[WEIGHT] += thread.weight
        totals[WALL] += thread.weight * max(0.0, frame.wall - own)
        totals[CPU] += thread.weight * max(0.0, frame.cpu - own)
        totals[QUEUED] += thread.weight * frame.queued
        if value is not None and made:
            totals[BYTES] += size_of(value)
            totals[SIZED] += 1
        if thread.frames:
            thread.frames[-1].since = thread.clock.read()
        else:
            self._plan_next(thread)

    def read(self, size: int) -> None:
        """So many bytes came from a file."""
        self._recorder.thread().of(self.name)[READ] += size

    def look(self, length: int) -> None:
        """The queue behind the operator holds so many elements now."""
        totals = self._recorder.thread().of(self.name)
        totals[HELD] += length
        totals[LOOKS] += 1

    def _plan_next(self, thread: _Thread) -> None:
        """How many outermost calls to skip, at random about the mean that keeps the share; never
        more than there were, since the first few may all have been quick ones."""
        now = time.perf_counter_ns()
        took = (now - thread.planned) / thread.weight
        thread.planned, thread.weight = now, 0
        thread.plans += 1
        thread.mean_ns += max(0.1, 1 / thread.plans) * (took - thread.mean_ns)
        cost = READS * thread.cost_ns * len(thread.totals)
        skipped = cost / (self._recorder.share * max(1.0, thread.mean_ns))
        wanted = int(thread.random.expovariate(1.0) * skipped)
        thread.skip = min(MOST_SKIPPED, thread.calls, wanted)


def _charge(frame: _Frame, now: Reading) -> None:
    frame.wall += now[0] - frame.since[0]
    frame.cpu += now[1] - frame.since[1]
    frame.queued += now[2] - frame.since[2]


def _overhead() -> tuple[float, float]:
    """What the clocks add to a timed call itself, and to the one around it, in CPU ns."""
    clock, frame = Clock(), []
    for _ in range(200):
        first, second = clock.read(), clock.read()
        frame.append(second[1] - first[1])
    clock.close()
    each = sorted(frame)[len(frame) // 2]
    return float(each), float(each)


def size_of(value: Any) -> int:
    """Bytes of a row, batch or value, without Python's own overhead for numbers and text."""
    if isinstance(value, np.ndarray | np.generic):
        return int(value.nbytes)
    if isinstance(value, str):
        return len(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return len(value)
    if isinstance(value, Mapping):
        return sum(map(size_of, value.values()))
    if isinstance(value, list | tuple):
        if len(value) > 8 and isinstance(value[0], int | float):
            return 8 * len(value)
        return sum(map(size_of, value))
    return 8


def figures(base: OperatorFigures, totals: list[float]) -> OperatorFigures:
    """``base`` (what the plan says of an operator) with what was recorded, scaled."""
    scale = totals[CALLS] / max(1.0, totals[WEIGHT])
    return replace(
        base,
        made=int(totals[MADE]),
        taken=int(totals[TAKEN]),
        timed=int(totals[TIMED]),
        cpu_ns=totals[CPU] * scale,
        wall_ns=max(totals[WALL], totals[CPU] + totals[QUEUED]) * scale,
        queued_ns=totals[QUEUED] * scale,
        bytes=totals[BYTES] / max(1.0, totals[SIZED]) * totals[MADE],
        read_bytes=totals[READ],
        buffered=totals[HELD] / max(1.0, totals[LOOKS]),
    )


def make_trace(
    bases: Sequence[OperatorFigures],
    parts: Sequence[Mapping[str, list[float]]],
    consumed: Consumption,
    **about: Any,
) -> Trace:
    """bases: what the plan says of each operator, inputs first. parts: `Recorder.totals` of
    each process. about: further fields of the trace."""
    nothing = [0.0] * WIDTH
    operators = {
        base.name: merge([figures(base, part.get(base.name, nothing)) for part in parts])
        for base in bases
    }
    return Trace(
        operators,
        bases[-1].name,
        float(consumed.wall_ns),
        float(consumed.stalled_ns),
        float(consumed.worked_ns),
        consumed.elements,
        cores=usable_cores(),
        resident=resident_bytes(),
        **about,
    )

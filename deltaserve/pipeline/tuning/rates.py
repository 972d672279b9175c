"""From a trace to service demands: what one element of the root costs at every operator.

Operational analysis as Plumber does it (Kuchnik, Klimovic, Simsa, Smith, Amvrosiadis: Plumber,
MLSys 2022, section 4.2). Visit ratio: V_root = 1, V_i = V_parent * made_i / taken by parent;
below a warm cache nothing runs, so V = 0. Rate: root elements per second of a core.

Plumber counts cores only. Python operators also wait (network, disk) while they hold a thread,
so a demand has both: seconds on a core and seconds of a thread.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from deltaserve.errors import PipelineError
from deltaserve.pipeline.trace import OperatorFigures, Trace


@dataclass(frozen=True)
class Lone:
    """An operator as it is with nobody beside it (see `gil.calibrate`). gil: share of its CPU
    time during which it holds the lock. waited_s: per element taken; what it waits beyond that
    while the pipeline runs, it waits for the lock."""

    gil: float = 1.0
    waited_s: float = float("inf")


UNKNOWN = Lone()
# These never wait for a disk or a network, so what they wait is for the lock.
WAITLESS = ("pack", "bucket", "batch", "shuffle", "repeat", "take", "mix", "interleave", "prefetch")


@dataclass(frozen=True)
class Demand:
    """Of one operator, per element of the root. visits: elements it makes; cpu_s, waited_s:
    on a core, and waiting while it holds its thread; element_bytes: of one of its own elements;
    gil: share of cpu_s during which it holds the interpreter's lock."""

    name: str
    op: str
    stage: str
    visits: float
    cpu_s: float
    waited_s: float
    serial: bool = False
    element_bytes: float = 0.0
    read_bytes: float = 0.0
    gil: float = 1.0
    lot: int = 1

    @property
    def held_s(self) -> float:
        """How long it occupies a thread."""
        return self.cpu_s + self.waited_s

    @property
    def rate(self) -> float:
        """Plumber's resource-accounted rate: root elements per core second."""
        return 1 / self.cpu_s if self.cpu_s > 0 else float("inf")


def visit_ratios(trace: Trace, cached: Collection[str] = ()) -> dict[str, float]:
    """V of every operator. cached: operators whose results are read from a warm cache.

    Raises PipelineError: the trace holds no whole element.
    """
    if not trace.operators[trace.root].made:
        raise PipelineError("the trace is too short: the pipeline did not finish one element")
    visits = {trace.root: 1.0}
    for name in reversed(list(trace.operators)):
        each = trace.operators[name]
        for child in each.inputs:
            below = trace.operators[child]
            # What was made ahead is in nobody's hands yet.
            made = below.made if below.handed is None else below.handed
            ratio = made / each.made if each.made else 0.0
            dead = name in cached or visits.get(name, 0.0) == 0
            visits[child] = visits.get(child, 0.0) + (0.0 if dead else visits[name] * ratio)
    return visits


def demands(
    trace: Trace, *, lone: Mapping[str, Lone] | None = None, cached: Collection[str] = ()
) -> dict[str, Demand]:
    """Of all operators, inputs first. lone: calibrations by name; an operator without one is
    taken to hold the lock all the time, and to wait for something of its own."""
    visits = visit_ratios(trace, cached)
    return {
        name: _demand(
            each, 0.0 if name in cached else visits[name], (lone or {}).get(name, UNKNOWN)
        )
        for name, each in trace.operators.items()
    }


def _demand(each: OperatorFigures, visits: float, lone: Lone) -> Demand:
    made = max(1, each.made)
    per_root = visits / made
    waited_s = min(each.waited_ns / 1e9, lone.waited_s * max(1, each.taken))
    return Demand(
        each.name,
        each.op,
        each.stage or each.name,
        visits,
        each.cpu_ns / 1e9 * per_root,
        0.0 if each.op in WAITLESS else waited_s * per_root,
        each.serial,
        each.bytes / made,
        each.read_bytes * per_root,
        lone.gil,
        each.lot,
    )


def by_cpu(trace: Trace) -> list[Demand]:
    """Bottleneck first: least rate times parallelism, of the resource-accounted rates."""
    found = demands(trace)
    lanes = {name: trace.operators[name].parallelism for name in found}
    return sorted(found.values(), key=lambda each: each.rate * lanes[each.name])


def by_wall(trace: Trace) -> list[str]:
    """What a wall clock would blame first: it charges the wait for the GIL to its victims."""
    figures = trace.operators.values()
    return [e.name for e in sorted(figures, key=lambda e: -e.wall_ns / max(1, e.parallelism))]


def bottleneck(trace: Trace, *, lone: Mapping[str, Lone] | None = None) -> str:
    """The operator that limits the pipeline.

    The lock is a station like a core: operators that hold it add up. When they keep it busy
    more than the slowest stage keeps its threads, the one that holds it longest limits; else
    the operator that occupies its stage's threads longest.
    """
    found = demands(trace, lone=lone)
    stages = stage_loads(trace, found)
    cores = sum(each.cpu_s for each in found.values()) / max(1, trace.cores)
    here = [each for each in found.values() if each.serial or not trace.processes]
    lock = sum(each.cpu_s * each.gil for each in here)
    worst = max(stages, key=lambda stage: stages[stage])
    shared = max(cores, lock)
    if shared > stages[worst] * 0.95:
        if lock >= cores:
            return max(here, key=lambda each: each.cpu_s * each.gil).name
        return max(found.values(), key=lambda each: each.cpu_s).name
    return max((e for e in found.values() if e.stage == worst), key=lambda e: e.held_s).name


def stage_loads(trace: Trace, found: Mapping[str, Demand]) -> dict[str, float]:
    """Seconds that each stage needs per element of the root, with its threads of now."""
    loads: dict[str, float] = {}
    for each in found.values():
        lanes = max(1, trace.operators[each.name].parallelism)
        loads[each.stage] = loads.get(each.stage, 0.0) + each.held_s / lanes
    return loads


def root_prefetch(trace: Trace) -> int:
    """Plumber's root prefetch: ceil(N* - N), N* = all service times / the bottleneck's, N the
    mean number of busy threads."""
    found = demands(trace)
    total = sum(each.held_s for each in found.values())
    worst = max(stage_loads(trace, found).values(), default=0.0)
    busy = total * trace.rate
    return max(0, -int(-(total / worst - busy) // 1)) if worst > 0 else 0

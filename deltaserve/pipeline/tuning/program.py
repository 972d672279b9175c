"""How many threads each stage gets: a linear program, solved by scipy's HiGHS.

    maximise X (elements a second), then minimise threads at that X, subject to
      X * held_s         <= threads of the stage     held: on a core or waiting
      X * sum cpu_s      <= cores
      X * sum gil cpu_s  <= 1                        the interpreter's lock; of what stays in
                                                     one process, if others do the rows
      X * read_bytes     <= bandwidth(threads)       piecewise linear, concave
      bytes of threads, buffers and processes <= memory
      threads of a serial stage <= 1
      X <= demand

Plumber's program (section 4.3) with threads beside cores, the lock, and the disk as a
constraint that binds. Parallel stages get 2 threads or more and some to spare where the cores
are not what limits: exact shares starve a cheap stage as soon as its estimate is a little off
(Plumber's loss on Mask-RCNN, 95 threads to 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import linprog

from deltaserve.errors import PipelineError
from deltaserve.pipeline.tuning.rates import Demand

HEDGE = 2
SPARE = 1.25
ENOUGH = 0.97
UNSURE = 0.85
Line = tuple[float, float]
"""bandwidth <= slope * threads + offset, bytes a second."""


@dataclass(frozen=True)
class Resources:
    """demand: elements a second that the trainer takes (None: as many as there can be).
    memory: bytes for threads, buffers and processes; cache_bytes: for caches (None: as memory
    says); process_bytes: of one worker process.
    transfer: seconds to send a row to another process, by the operator that makes it.
    bandwidth: by source. fixed: settings of stages that are not to be changed.
    locked: whether the interpreter has a lock."""

    cores: float
    memory: float = float("inf")
    cache_bytes: float | None = None
    demand: float | None = None
    max_threads: int = 32
    max_processes: int = 0
    process_bytes: float = 0.0
    locked: bool = True
    transfer: Mapping[str, float] = field(default_factory=dict)
    bandwidth: Mapping[str, Sequence[Line]] = field(default_factory=dict)
    fixed: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Allocation:
    """rate: the bound X. threads: by stage, whole. exact: by stage, as the program has them.
    limits: what binds: "cores", "gil", "memory", "demand", "disk of NAME" or "stage NAME"."""

    rate: float
    threads: Mapping[str, int]
    exact: Mapping[str, float]
    buffers: Mapping[str, int]
    processes: int
    limits: tuple[str, ...]


def allocate(found: Mapping[str, Demand], resources: Resources) -> Allocation:
    """The best of `allocations`. Raises PipelineError: see there."""
    return best_of(allocations(found, resources))


def allocations(found: Mapping[str, Demand], resources: Resources) -> list[Allocation]:
    """For threads, and for each number of processes that fits.

    Raises PipelineError: not even the least fits the memory.
    """
    options = []
    for processes in range(resources.max_processes + 1 if resources.locked else 1):
        option = _Program(found, resources, processes).solve()
        if option is not None:
            options.append(option)
    if not options:
        raise PipelineError(
            f"the least that this pipeline needs does not fit {resources.memory:.3g} bytes of "
            "memory: give it more, or make buffers, windows or batches smaller"
        )
    return options


def best_of(options: Sequence[Allocation]) -> Allocation:
    """Fewer processes win unless they cost more than 3 % of the rate."""
    best = max(option.rate for option in options)
    return next(option for option in options if option.rate >= ENOUGH * best)


def other_way(options: Sequence[Allocation], chosen: Allocation) -> Allocation | None:
    """The best with processes where threads are chosen, and with threads where processes are,
    if the program cannot tell which is faster: what passing the lock around costs is not in it."""
    others = [each for each in options if bool(each.processes) != bool(chosen.processes)]
    other = best_of(others) if others else None
    return other if other and other.rate >= UNSURE * chosen.rate else None


class _Program:
    """Variables: X, then the threads of each stage."""

    def __init__(self, found: Mapping[str, Demand], resources: Resources, processes: int) -> None:
        self.found, self.resources, self.processes = found, resources, processes
        self.stages = list(dict.fromkeys(each.stage for each in found.values()))
        self.rows: list[np.ndarray] = []
        self.bounds: list[float] = []
        self.names: list[str] = []
        self._constrain()

    def of(self, stage: str) -> list[Demand]:
        return [each for each in self.found.values() if each.stage == stage]

    def serial(self, stage: str) -> bool:
        return any(each.serial for each in self.of(stage))

    def thread_bytes(self, stage: str) -> float:
        """What one more thread keeps in flight: a lot of each operator, and its place in the
        buffer behind."""
        return 2 * sum(each.element_bytes * each.lot for each in self.of(stage))

    def _add(self, name: str, bound: float, rate: float, threads: Mapping[str, float]) -> None:
        row = np.zeros(1 + len(self.stages))
        row[0] = rate
        for stage, value in threads.items():
            row[1 + self.stages.index(stage)] = value
        self.rows.append(row)
        self.bounds.append(bound)
        self.names.append(name)

    def _constrain(self) -> None:
        given, every = self.resources, self.found.values()
        for stage in self.stages:
            held = sum(each.held_s for each in self.of(stage)) + self._transfer(stage)
            self._add(f"stage {stage}", 0.0, held, {stage: -1.0})
        work = sum(each.cpu_s for each in every) + 2 * self._transfers()
        self._add("cores", given.cores, work, {})
        if given.locked:
            # Worker processes have locks of their own; one has one thread.
            here = [each for each in every if each.serial or not self.processes]
            lock = sum(each.cpu_s * each.gil for each in here) + self._transfers()
            self._add("gil", 1.0, lock, {})
        for name, lines in given.bandwidth.items():
            for slope, offset in lines:
                stage, read = self.found[name].stage, self.found[name].read_bytes
                self._add(f"disk of {name}", offset, read, {stage: -slope})
        if math.isfinite(given.memory):
            left = given.memory - self.processes * given.process_bytes
            each_bytes = {stage: self.thread_bytes(stage) for stage in self.stages}
            self._add("memory", left, 0.0, each_bytes)

    def _transfer(self, stage: str) -> float:
        """Seconds to send what a stage makes for one element of the root to another process;
        receiving it takes as long."""
        if not self.processes or self.serial(stage):
            return 0.0
        last = self.of(stage)[-1]
        return self.resources.transfer.get(last.name, 0.0) * last.visits

    def _transfers(self) -> float:
        return sum(self._transfer(stage) for stage in self.stages)

    def _ranges(self) -> list[tuple[float, float | None]]:
        given = self.resources
        ranges: list[tuple[float, float | None]] = [(0.0, given.demand)]
        for stage in self.stages:
            least = 0.0
            most = 1.0 if self.serial(stage) else float(self.processes or given.max_threads)
            if stage in given.fixed:
                least = most = float(given.fixed[stage])
            ranges.append((least, most))
        return ranges

    def _solve(
        self, cost: np.ndarray, ranges: list[tuple[float, float | None]]
    ) -> np.ndarray | None:
        # Rates of 1e-3 to 1e6 a second in one program: scaled, so that HiGHS's tolerance
        # (1e-7) means the same for all.
        scale = self._scale()
        rows = np.array(self.rows)
        rows[:, 0] *= scale
        norms = np.abs(rows).max(axis=1, initial=0.0)
        norms[norms == 0] = 1.0
        shown = [(low / scale, None if high is None else high / scale) for low, high in ranges[:1]]
        found = linprog(
            cost, rows / norms[:, None], np.array(self.bounds) / norms, bounds=shown + ranges[1:]
        )
        if not found.success:
            return None
        values = np.array(found.x)
        values[0] *= scale
        return values

    def _scale(self) -> float:
        slowest = max(sum(e.held_s for e in self.of(stage)) for stage in self.stages)
        return 1 / slowest if slowest > 0 else 1.0

    def solve(self) -> Allocation | None:
        if self.resources.memory < self.processes * self.resources.process_bytes:
            return None
        count, ranges = len(self.stages), self._ranges()
        if not any(row[0] > 0 for row in self.rows) and self.resources.demand is None:
            raise PipelineError("the trace holds no time at all: trace more elements")
        fastest = self._solve(np.array([-1.0] + [0.0] * count), ranges)
        if fastest is None:
            return None
        ranges[0] = (fastest[0] * (1 - 1e-6), ranges[0][1])
        least = self._solve(np.array([0.0] + [1.0] * count), ranges)
        values = fastest if least is None else least
        exact = dict(zip(self.stages, map(float, values[1:]), strict=True))
        limits = self._limits(fastest)
        threads = self._whole(exact, "cores" in limits)
        rate = float(fastest[0])
        buffers = {stage: 0 if self.serial(stage) else 2 * threads[stage] for stage in self.stages}
        return Allocation(rate, threads, exact, buffers, self.processes, limits)

    def _whole(self, exact: Mapping[str, float], busy: bool) -> dict[str, int]:
        """Rounded up, hedged, within memory. busy: the cores are what limits, so that only
        threads that wait are worth some to spare."""
        whole = {}
        for stage, value in exact.items():
            if self.serial(stage) or stage in self.resources.fixed:
                whole[stage] = int(self.resources.fixed.get(stage, 1))
            else:
                spare = (SPARE - 1) * value * (self._waiting(stage) if busy else 1.0)
                wanted = max(HEDGE, math.ceil(value + spare - 1e-6))
                whole[stage] = self.processes or min(self.resources.max_threads, wanted)
        spent = sum(whole[stage] * self.thread_bytes(stage) for stage in whole)
        left = self.resources.memory - self.processes * self.resources.process_bytes
        while spent > left:
            most = max(whole, key=lambda stage: whole[stage] * self.thread_bytes(stage))
            if whole[most] <= 1:
                break
            whole[most] -= 1
            spent -= self.thread_bytes(most)
        return whole

    def _waiting(self, stage: str) -> float:
        """Share of its threads' time."""
        held = sum(each.held_s for each in self.of(stage))
        return sum(each.waited_s for each in self.of(stage)) / held if held else 0.0

    def _limits(self, values: np.ndarray) -> tuple[str, ...]:
        binding = []
        for name, row, bound in zip(self.names, self.rows, self.bounds, strict=True):
            used, size = float(row @ values) - bound, float(np.abs(row) @ np.abs(values))
            stage = name.removeprefix("stage ")
            free = name.startswith("stage ") and not self._at_most(stage, values)
            if size > 0 and used >= -1e-5 * size and not free:
                binding.append(name)
        demand = self.resources.demand
        if demand is not None and values[0] >= demand * (1 - 1e-5):
            return ("demand",)
        return tuple(dict.fromkeys(binding))

    def _at_most(self, stage: str, values: np.ndarray) -> bool:
        """Whether a stage that needs all its threads could not have more."""
        high = self._ranges()[1 + self.stages.index(stage)][1]
        return high is not None and values[1 + self.stages.index(stage)] >= high - 1e-5


def fit_bandwidth(threads: Sequence[int], measured: Sequence[float]) -> list[Line]:
    """A rising line through the origin and a level one, from bytes a second at some numbers of
    threads. Predicting too much costs four times as much as predicting too little.

    Raises PipelineError: fewer than two measurements.
    """
    if len(threads) < 2 or len(threads) != len(measured):
        raise PipelineError("a source's bandwidth needs measurements at two or more settings")
    x, y = np.asarray(threads, float), np.asarray(measured, float)
    best: tuple[float, list[Line]] | None = None
    for slope in np.unique(y / x):
        for level in np.unique(np.concatenate([y, [y[-len(y) // 2 :].mean()]])):
            error = np.minimum(slope * x, level) - y
            loss = float((np.where(error > 0, 4.0, 1.0) * error**2).sum())
            if best is None or loss < best[0]:
                best = (loss, [(float(slope), 0.0), (0.0, float(level))])
    assert best is not None
    return best[1]

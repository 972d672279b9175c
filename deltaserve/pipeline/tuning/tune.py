"""Tuning in at most three traces: as it is, with one thread each, and as advised.

What an operator costs is read from the run with one thread for each stage, where threads hardly
wait for the lock or for cores, so the advice does not depend on how bad the start was. The
third trace runs the advice; what it shows about costs is used once more.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from deltaserve.pipeline.trace import Trace
from deltaserve.pipeline.tuning.cacheplace import Nature
from deltaserve.pipeline.tuning.program import Resources
from deltaserve.pipeline.tuning.rates import Lone
from deltaserve.pipeline.tuning.recommend import Advice, advise

Threads = Mapping[str, int]


class Traced(Protocol):
    """A running pipeline that is recorded."""

    def __next__(self) -> Any: ...

    def trace(self) -> Trace: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Tuned:
    """threads: what to set, by stage. advice: of the last trace. traces: start, calibration
    and, unless the start was as good, the advised setting. rate: elements a second, measured
    with ``threads``."""

    threads: Threads
    advice: Advice
    traces: tuple[Trace, ...]
    rate: float


def run_traced(
    opened: Traced,
    *,
    seconds: float,
    elements: int | None = None,
    compute_s: float = 0.0,
) -> Trace:
    """Take elements for so long (or so many), working ``compute_s`` on each; closes it."""
    try:
        end = time.perf_counter() + seconds
        taken = 0
        while time.perf_counter() < end and (elements is None or taken < elements):
            try:
                next(opened)
            except StopIteration:
                break
            taken += 1
            if compute_s:
                time.sleep(compute_s)
        return opened.trace()
    finally:
        opened.close()


def tune(
    open_with: Callable[[Threads], Traced],
    start: Threads,
    resources: Resources,
    *,
    seconds: float = 2.0,
    elements: int | None = None,
    compute_s: float = 0.0,
    lone: Mapping[str, Lone] | None = None,
    natures: Mapping[str, Nature] | None = None,
    epochs: int = 1,
) -> Tuned:
    """open_with: the pipeline with these threads by stage, from its beginning. start: the
    settings of now."""

    def traced(threads: Threads) -> Trace:
        opened = open_with(threads)
        return run_traced(opened, seconds=seconds, elements=elements, compute_s=compute_s)

    more: dict[str, Any] = {"lone": lone, "natures": natures, "epochs": epochs}
    before = traced(start)
    single = dict.fromkeys(start, 1)
    calibration = before if dict(start) == single else traced(single)
    first = advise(calibration, resources, **more)
    threads = {name: first.allocation.threads[name] for name in start}
    after = traced(threads)
    if after.rate < before.rate:
        return Tuned(dict(start), first, (before, calibration, after), before.rate)
    return Tuned(threads, first, (before, calibration, after), after.rate)

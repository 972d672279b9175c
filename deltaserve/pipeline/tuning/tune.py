"""Tuning in at most three traces: as it is, with one thread each, and as advised.

What an operator costs is read from the run with one thread for each stage, where threads hardly
wait for the lock or for cores, so the advice does not depend on how bad the start was. The
third trace runs the advice; the fastest of the three is kept. Caches are not
measured: they pay from the second epoch on.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from deltaserve.errors import PipelineError
from deltaserve.pipeline.trace import Trace
from deltaserve.pipeline.tuning.program import Resources
from deltaserve.pipeline.tuning.recommend import Advice, advise
from deltaserve.pipeline.tuning.settings import Settings


class TooShortError(PipelineError):
    """A plan gives too few elements to be measured."""


class Traced(Protocol):
    """A running pipeline that is recorded."""

    def __next__(self) -> Any: ...

    def start_clock(self) -> None: ...

    def trace(self) -> Trace: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Tuned:
    """settings: what to set. advice: of the trace with one thread each. traces: start,
    calibration and the advised setting. rate: elements a second, measured with ``settings``."""

    settings: Settings
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
    """Take elements for so long (or so many) after the first one, working ``compute_s`` on
    each; closes it. Raises TooShortError: it ends with the first element, or before."""
    try:
        if next(opened, None) is None:
            raise TooShortError("the pipeline gives nothing that could be measured")
        opened.start_clock()
        end = time.perf_counter() + seconds
        taken = 0
        # At least one, however slow.
        while not taken or (time.perf_counter() < end and (elements is None or taken < elements)):
            if compute_s:
                time.sleep(compute_s)
            if next(opened, None) is None:
                break
            taken += 1
        if not taken:
            raise TooShortError(
                "the pipeline ends with its first element: give it more rows, or epochs"
            )
        return opened.trace()
    finally:
        opened.close()


def tune(
    open_with: Callable[[Settings], Traced],
    start: Settings,
    stages: list[str],
    resources: Resources,
    *,
    seconds: float = 2.0,
    elements: int | None = None,
    compute_s: float = 0.0,
    **known: Any,
) -> Tuned:
    """open_with: the pipeline with these settings, from its beginning. start: those of now.
    stages: the parallel ones. known: what `advise` is told beside the trace."""

    def traced(settings: Settings) -> Trace:
        opened = open_with(settings)
        return run_traced(opened, seconds=seconds, elements=elements, compute_s=compute_s)

    before = traced(start)
    single = Settings(dict.fromkeys(stages, 1))
    same = not start.processes and all(start.workers(stage) == 1 for stage in stages)
    calibration = before if same else traced(single)
    advice = advise(calibration, resources, **known)
    settings = advised(advice, stages)
    # Measured as it is while caches fill.
    after = traced(replace(settings, caches=()))
    traces = (before, calibration, after)
    # Of equal ones the advised, then that with one thread.
    best, trace = max(
        ((settings, after), (single, calibration), (start, before)), key=lambda each: each[1].rate
    )
    return Tuned(replace(best, caches=settings.caches), advice, traces, trace.rate)


def advised(advice: Advice, stages: list[str]) -> Settings:
    """What an advice says to set."""
    chosen = advice.allocation
    return Settings(
        {name: chosen.threads[name] for name in stages if not chosen.processes},
        chosen.processes,
        advice.prefetch,
        tuple(place.name for place in advice.caches),
    )

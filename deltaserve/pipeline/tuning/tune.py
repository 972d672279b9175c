"""Tuning in at most three traces: as it is, with one thread each, and as advised.

What an operator costs is read from the run with one thread for each stage, where threads hardly
wait for the lock or for cores, so the advice does not depend on how bad the start was. The
third trace runs the advice. It is kept unless one of these, or as many threads as there are cores,
beats it again and again in turns: the machine may have had other work during one of the traces.
Caches are not measured: they pay from the second epoch on.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Protocol

from deltaserve.errors import PipelineError
from deltaserve.pipeline.consumption import Consumption
from deltaserve.pipeline.trace import Trace
from deltaserve.pipeline.tuning.program import Resources
from deltaserve.pipeline.tuning.recommend import Advice, advise
from deltaserve.pipeline.tuning.settings import Settings

LOOK, PATIENCE = 0.25, 3.0
"""How long a pipeline is seen before it is measured, and how long it may take to get into step; as
shares of the time that it is measured."""
CLEARLY = 1.03
TURNS = 3


class TooShortError(PipelineError):
    """A plan gives too few elements to be measured."""


class Traced(Protocol):
    """A running pipeline that is recorded."""

    consumed: Consumption

    def __next__(self) -> Any: ...

    def settled(self) -> bool: ...

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


def run_traced(opened: Traced, *, seconds: float, compute_s: float = 0.0) -> Trace:
    """Take elements for so long, working ``compute_s`` on each; closes it.

    It is measured from when workers are in step with the consumer (all of a plan that ends
    before): many threads make much before the first element comes, and it would count as made
    within the time. Elements come in bursts where an operator gives out a window of them; the
    time begins and ends behind one that had to be waited for.

    Raises TooShortError: the plan ends with the first element, or before.
    """
    try:
        if next(opened, None) is None:
            raise TooShortError("the pipeline gives nothing that could be measured")
        opened.consumed = Consumption()
        before = opened.consumed
        in_step = False
        while True:
            if compute_s:
                time.sleep(compute_s)
            stalled_ns = opened.consumed.stalled_ns
            if next(opened, None) is None:
                break
            now = opened.consumed
            ran_s, waited_ns = now.wall_ns / 1e9, now.stalled_ns - stalled_ns
            if in_step and ran_s >= seconds:
                break
            waited_for = waited_ns >= now.stalled_ns / now.elements
            seen = ran_s >= LOOK * seconds and (opened.settled() or ran_s > PATIENCE * seconds)
            if not in_step and seen and waited_for:
                in_step, opened.consumed = True, Consumption()
        if not opened.consumed.elements:
            opened.consumed = before
        if not before.elements:
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
    compute_s: float = 0.0,
    **known: Any,
) -> Tuned:
    """open_with: the pipeline with these settings, from its beginning. start: those of now.
    stages: the parallel ones. known: what `advise` is told beside the trace."""

    def traced(settings: Settings, for_s: float = seconds) -> Trace:
        return run_traced(open_with(settings), seconds=for_s, compute_s=compute_s)

    before = traced(start)
    single = Settings(dict.fromkeys(stages, 1))
    calibration = before if start.same_workers(single, stages) else traced(single)
    advice = advise(calibration, resources, **known)
    settings = advised(advice, stages)
    # Measured as it is while caches fill.
    best = replace(settings, caches=())
    after = traced(best)
    rate = after.rate
    cores = min(resources.max_threads, round(resources.cores))
    rivals = [replace(best, threads=dict.fromkeys(stages, cores), processes=0)]
    other = max((before, calibration), key=lambda trace: trace.rate)
    if other.rate > CLEARLY * after.rate:
        rivals.append(start if other is before else single)
    for rival in rivals:
        if not rival.same_workers(best, stages):
            won = _won(rival, best, traced, seconds / 2)
            best, rate = (rival, won) if won else (best, rate)
    kept = replace(best, caches=settings.caches)
    return Tuned(kept, advice, (before, calibration, after), rate)


def _won(
    rival: Settings, best: Settings, traced: Callable[[Settings, float], Trace], seconds: float
) -> float:
    """The rival's mean rate, if it is clearly faster in each of three turns; else 0."""
    found = []
    for turn in range(TURNS):
        # Neither is always the first.
        order = (best, rival) if turn % 2 else (rival, best)
        rates = {each is rival: traced(each, seconds).rate for each in order}
        if rates[True] <= CLEARLY * rates[False]:
            return 0.0
        found.append(rates[True])
    return statistics.mean(found)


def advised(advice: Advice, stages: list[str]) -> Settings:
    """What an advice says to set."""
    chosen = advice.allocation
    return Settings(
        {name: chosen.threads[name] for name in stages if not chosen.processes},
        chosen.processes,
        advice.prefetch,
        tuple(place.name for place in advice.caches),
    )

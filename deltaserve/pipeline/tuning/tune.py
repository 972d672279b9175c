"""Tuning in at most three traces: as it is, with one thread each, and as advised.

What an operator costs is read from the run with one thread for each stage, where threads hardly
wait for the lock or for cores, so the advice does not depend on how bad the start was. The
third trace runs the advice. Then it takes turns with what the model may be wrong about: processes
instead of threads (or threads instead of processes) where their bounds are within 15 %, as many
threads as there are cores, as many for each stage as the largest has, and the first two traces'
settings if one was faster. The advice is kept unless one of these is clearly faster.
Caches are not measured: they pay from the second epoch on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from deltaserve.errors import PipelineError
from deltaserve.pipeline.consumption import Consumption
from deltaserve.pipeline.trace import Trace, difference
from deltaserve.pipeline.tuning.program import Allocation, Resources
from deltaserve.pipeline.tuning.recommend import Advice, advise
from deltaserve.pipeline.tuning.settings import Settings
from deltaserve.pipeline.tuning.trial import CLEARLY, Tried, fastest, side_by_side

LOOK, PATIENCE = 0.25, 3.0
"""How long a pipeline is seen before it is measured, and how long it may take to get into step; as
shares of the time that it is measured."""


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
    calibration and the advised setting. rate: elements a second, measured with ``settings``.
    tried: what took turns, the advised setting first."""

    settings: Settings
    advice: Advice
    traces: tuple[Trace, ...]
    rate: float
    tried: tuple[Tried, ...]


def run_traced(opened: Traced, *, seconds: float, compute_s: float = 0.0) -> Trace:
    """Take elements for so long, working ``compute_s`` on each; closes it.

    It is measured from when workers are in step with the consumer (all of a plan that ends
    before): many threads make much before the first element comes, and it would count as made
    within the time; and first calls load what later ones have. Elements come in bursts where an
    operator gives out a window of them; the time begins and ends behind one that had to be waited
    for.

    Raises TooShortError: the plan ends with the first element, or before.
    """
    try:
        if next(opened, None) is None:
            raise TooShortError("the pipeline gives nothing that could be measured")
        opened.consumed = Consumption()
        began = in_step = opened.trace()
        while True:
            if compute_s:
                time.sleep(compute_s)
            stalled_ns = opened.consumed.stalled_ns
            if next(opened, None) is None:
                break
            now = opened.consumed
            ran_s = (now.wall_ns - in_step.wall_ns) / 1e9
            if in_step is not began and ran_s >= seconds:
                break
            waited_for = now.stalled_ns - stalled_ns >= now.stalled_ns / now.elements
            seen = ran_s >= LOOK * seconds and (opened.settled() or ran_s > PATIENCE * seconds)
            if in_step is began and seen and waited_for:
                in_step = opened.trace()
        if not opened.consumed.elements:
            raise TooShortError(
                "the pipeline ends with its first element: give it more rows, or epochs"
            )
        return _since(in_step, opened.trace())
    finally:
        opened.close()


def _since(in_step: Trace, whole: Trace) -> Trace:
    """What happened from there on; all of it where that says nothing. Of an operator that made
    nothing since then, what it did before."""
    found = difference(in_step, whole)
    if found.elements <= 0:
        return whole
    if any(not each.made or not each.timed for each in found.operators.values()):
        return replace(found, operators=whole.operators)
    return found


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
    bare = replace(settings, caches=())
    after = traced(bare)
    rivals = _rivals(advice, bare, stages, resources)
    other = max((before, calibration), key=lambda trace: trace.rate)
    if other.rate > CLEARLY * after.rate:
        rivals.append(start if other is before else single)
    tried = side_by_side(
        _different([bare, *rivals], stages), lambda each: traced(each, seconds / 2).rate
    )
    best = fastest(tried)
    kept = replace(best.settings, caches=settings.caches)
    return Tuned(kept, advice, (before, calibration, after), best.rate, tuple(tried))


def _rivals(
    advice: Advice, best: Settings, stages: Sequence[str], resources: Resources
) -> list[Settings]:
    """What is tried beside what is advised."""
    cores = min(resources.max_threads, round(resources.cores))
    found = [replace(best, threads=dict.fromkeys(stages, cores), processes=0)]
    if advice.other is not None:
        found.append(_settings(advice, advice.other, stages))
    # A stage that waits gives in bursts; the program, which knows but means, lets one beside it
    # have too few rows ready for them.
    most = max(map(best.workers, stages), default=0)
    if not best.processes and "memory" not in advice.allocation.limits:
        found.append(replace(best, threads=dict.fromkeys(stages, most)))
    return [replace(each, caches=()) for each in found]


def _different(settings: Sequence[Settings], stages: Sequence[str]) -> list[Settings]:
    found: list[Settings] = []
    for each in settings:
        if not any(each.same_workers(known, stages) for known in found):
            found.append(each)
    return found


def advised(advice: Advice, stages: Sequence[str]) -> Settings:
    """What an advice says to set."""
    return _settings(advice, advice.allocation, stages)


def _settings(advice: Advice, chosen: Allocation, stages: Sequence[str]) -> Settings:
    return Settings(
        {name: chosen.threads[name] for name in stages if not chosen.processes},
        chosen.processes,
        advice.prefetch,
        tuple(place.name for place in advice.caches),
    )

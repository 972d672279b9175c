"""From a trace to settings: what limits the pipeline, and what to set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from deltaserve.pipeline.trace import Trace
from deltaserve.pipeline.tuning.cacheplace import Nature, Place, place, places
from deltaserve.pipeline.tuning.program import Allocation, Resources, allocate
from deltaserve.pipeline.tuning.rates import Demand, Lone, bottleneck, demands, root_prefetch

MOST_PREFETCH = 64


@dataclass(frozen=True)
class Advice:
    """bottleneck: the operator that limits now. demands: per element of the root.
    allocation: threads and processes; its rate is an upper bound. caches: where they pay (none
    without a second epoch). refused: why nothing nearer the root may be cached. prefetch:
    elements at the root."""

    bottleneck: str
    demands: Mapping[str, Demand]
    allocation: Allocation
    caches: tuple[Place, ...]
    refused: tuple[Place, ...]
    prefetch: int


def advise(
    trace: Trace,
    resources: Resources,
    *,
    lone: Mapping[str, Lone] | None = None,
    natures: Mapping[str, Nature] | None = None,
    epochs: int = 1,
) -> Advice:
    """Threads by the linear program; with several epochs, caches first, and what lies below
    them costs nothing then.

    Raises PipelineError: the trace is too short, or the memory too small.
    """
    if not resources.locked:
        known = lone or {}
        lone = {name: replace(known.get(name, Lone()), gil=0.0) for name in trace.operators}
    found = demands(trace, lone=lone)
    chosen: list[Place] = []
    refused: list[Place] = []
    if natures and epochs > 1:
        chosen = place(found, natures, resources.memory)
        refused = [each for each in places(found, natures).values() if not each.legal]
    warm = demands(trace, lone=lone, cached={each.name for each in chosen})
    allocation = allocate(warm, resources)
    return Advice(
        bottleneck(trace, lone=lone),
        found,
        allocation,
        tuple(chosen),
        tuple(refused),
        min(MOST_PREFETCH, max(2, root_prefetch(trace))),
    )

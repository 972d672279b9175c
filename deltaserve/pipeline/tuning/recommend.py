"""From a trace to settings: what limits the pipeline, and what to set."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from deltaserve.pipeline.trace import Trace
from deltaserve.pipeline.tuning.analytic import Model, Operator
from deltaserve.pipeline.tuning.cacheplace import Nature, Place, place, places
from deltaserve.pipeline.tuning.program import (
    Allocation,
    Resources,
    allocate,
    allocations,
    best_of,
    other_way,
)
from deltaserve.pipeline.tuning.rates import Demand, Lone, bottleneck, demands, root_prefetch
from deltaserve.pipeline.tuning.search import Budget, hill_climb

MOST_PREFETCH = 64
By = Literal["program", "tfdata"]


@dataclass(frozen=True)
class Advice:
    """bottleneck: the operator that limits now. demands: per element of the root.
    allocation: threads and processes; its rate is an upper bound. warm: the same once the
    caches are filled. caches: where they pay (none without a second epoch). refused: why
    nothing nearer the root may be cached. prefetch: elements at the root. parts: of fused
    operators, the share of the time that each part takes. other: processes instead of threads,
    or threads instead of processes, where the program cannot tell which is faster."""

    bottleneck: str
    demands: Mapping[str, Demand]
    allocation: Allocation
    warm: Allocation
    caches: tuple[Place, ...]
    refused: tuple[Place, ...]
    prefetch: int
    parts: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    other: Allocation | None = None

    @property
    def slowest(self) -> str:
        """The bottleneck, or the part of it that takes longest."""
        parts = self.parts.get(self.bottleneck)
        return max(parts, key=lambda name: parts[name]) if parts else self.bottleneck


def advise(
    trace: Trace,
    resources: Resources,
    *,
    lone: Mapping[str, Lone] | None = None,
    natures: Mapping[str, Nature] | None = None,
    epochs: float = 1,
    by: By = "program",
    parts: Mapping[str, Mapping[str, float]] | None = None,
) -> Advice:
    """Threads by the linear program, or by tf.data's analytic model; with several epochs,
    caches too, and what lies below them costs nothing once they are filled.

    Raises PipelineError: the trace is too short, or the memory too small.
    """
    if not resources.locked:
        known = lone or {}
        lone = {name: replace(known.get(name, Lone()), gil=0.0) for name in trace.operators}
    found = demands(trace, lone=lone)
    chosen: list[Place] = []
    refused: list[Place] = []
    if natures and epochs > 1:
        room = resources.memory if resources.cache_bytes is None else resources.cache_bytes
        chosen = place(found, natures, room)
        refused = [each for each in places(found, natures).values() if not each.legal]
    warm = demands(trace, lone=lone, cached={each.name for each in chosen})
    options = allocations(found, resources) if by == "program" else []
    cold = best_of(options) if options else climb(trace, found, resources)
    return Advice(
        bottleneck(trace, lone=lone),
        found,
        cold,
        allocate(warm, resources) if chosen else cold,
        tuple(chosen),
        tuple(refused),
        min(MOST_PREFETCH, max(2, root_prefetch(trace))),
        parts or {},
        other_way(options, cold),
    )


def model_of(trace: Trace, found: Mapping[str, Demand], max_threads: int) -> Model:
    """tf.data's model of a traced pipeline. Threads of a stage run all its operators, as those
    of a parallel interleave do: the stage's last operator is one."""
    last = {each.stage: name for name, each in found.items() if not each.serial}
    operators = {}
    for name, each in found.items():
        inputs = trace.operators[name].inputs
        below = [found[i].visits for i in inputs]
        shared = last.get(each.stage) == name
        operators[name] = Operator(
            name,
            each.held_s * 1e9 / each.visits if each.visits else 0.0,
            # Of a way that takes from one input at a time, all inputs together.
            sum(below) / each.visits / (1 if shared else len(inputs)) if inputs else 1.0,
            "interleave" if shared else "sync",
            inputs,
            high=max_threads,
            element_bytes=each.element_bytes * each.lot,
        )
    return Model(operators, trace.root, trace.consumer_ns / max(1, trace.elements))


def climb(trace: Trace, found: Mapping[str, Demand], resources: Resources) -> Allocation:
    """Threads by hill climbing on that model; it knows no lock, no disk and no processes."""
    model = model_of(trace, found, resources.max_threads)
    settings = hill_climb(model, Budget(resources.cores, resources.memory))
    threads = {each.stage: 1 for each in found.values()}
    threads |= {found[name].stage: count for name, count in settings.items()}
    waits = model.output_ns({name: float(count) for name, count in settings.items()})
    exact = {stage: float(count) for stage, count in threads.items()}
    buffers = {found[name].stage: 2 * count for name, count in settings.items()}
    rate = 1e9 / max(1.0, waits + model.consumer_ns)
    return Allocation(rate, threads, exact, buffers, 0, ("tf.data's model",))

"""Three searches over the settings of tf.data's model, as TensorFlow's `model.cc` has them.

hill_climb   from the lowest settings, one step at a time where it shortens the wait most
gradient     downhill in real numbers, rounded at the end
stage_based  one more thread for the slowest stage, until it is as fast as the consumer
"""

from __future__ import annotations

import heapq
from collections.abc import Callable
from dataclasses import dataclass

from deltaserve.pipeline.tuning.analytic import Model, Operator

BUFFER_GAIN_NS = 1.0
GRADIENT_STEPS = 1000
GRADIENT_GAIN_NS = 100.0
GRADIENT_STEP = 0.1
DIFFERENCE = 1e-3


@dataclass(frozen=True)
class Budget:
    """cores: threads worth having; memory: bytes that all buffers may hold."""

    cores: float
    memory: float = float("inf")


Search = Callable[[Model, Budget], dict[str, int]]


def hill_climb(model: Model, budget: Budget) -> dict[str, int]:
    """Stops when all is at its highest, the cores cannot do better, or memory is used up."""
    settings = model.lowest()
    enough = model.processing_ns() / budget.cores
    while (now := model.output_ns(settings)) >= enough:
        best, best_gain = None, 0.0
        for each in model.tunable():
            if settings[each.name] >= each.high:
                continue
            higher = settings | {each.name: settings[each.name] + 1}
            gain = now - model.output_ns(higher)
            least = BUFFER_GAIN_NS if each.way == "prefetch" else 0.0
            if gain > max(best_gain, least):
                best, best_gain = higher, gain
        if best is None or model.buffered_bytes(best) > budget.memory:
            break
        settings = best
    return _rounded(model, settings)


def gradient(model: Model, budget: Budget) -> dict[str, int]:
    """Parallelism stays once it adds up to the cores; buffers go on."""
    settings = model.lowest()
    now = model.output_ns(settings)
    for _ in range(GRADIENT_STEPS):
        free = [o for o in model.tunable() if _may_move(model, o, settings, budget)]
        slopes = {o.name: _slope(model, settings, o.name) for o in free}
        steepest = max((abs(slope) for slope in slopes.values()), default=0.0)
        if steepest == 0:
            break
        moved = dict(settings)
        for each in free:
            step = GRADIENT_STEP * slopes[each.name] / steepest
            moved[each.name] = min(each.high, max(each.low, settings[each.name] - step))
        then = model.output_ns(moved)
        if model.buffered_bytes(moved) > budget.memory:
            break
        gain, settings, now = now - then, moved, then
        if gain < GRADIENT_GAIN_NS:
            break
    return _rounded(model, settings)


def _may_move(model: Model, each: Operator, settings: dict[str, float], budget: Budget) -> bool:
    if each.way == "prefetch":
        return True
    return sum(settings[o.name] for o in model.tunable() if o.way != "prefetch") < budget.cores


def _slope(model: Model, settings: dict[str, float], name: str) -> float:
    """dT / d setting, by a central difference."""
    low = settings | {name: settings[name] - DIFFERENCE}
    high = settings | {name: settings[name] + DIFFERENCE}
    return (model.output_ns(high) - model.output_ns(low)) / (2 * DIFFERENCE)


def stage_based(model: Model, budget: Budget) -> dict[str, int]:
    """Raises the slowest stage until all are at most ``model.consumer_ns``.

    Leaves the lowest settings alone when the buffers that this takes do not fit the memory;
    a stage whose operator is at its highest, or has none to raise, ends the search.
    """
    settings = model.lowest()
    stages = model.stages()
    slowest = [(-_stage_ns(model, stage, settings), name) for name, stage in stages.items()]
    heapq.heapify(slowest)
    while slowest and -slowest[0][0] > model.consumer_ns:
        _, name = heapq.heappop(slowest)
        each = model.operators[name]
        if each.way not in ("parallel", "interleave") or settings[name] >= each.high:
            break
        settings[name] += 1
        heapq.heappush(slowest, (-_stage_ns(model, stages[name], settings), name))
    if model.buffered_bytes(settings) > budget.memory:
        settings = model.lowest()
    return _rounded(model, settings)


def _stage_ns(model: Model, stage: list[tuple[str, float]], settings: dict[str, float]) -> float:
    """Time that a stage needs per element of the root; its first operator owns the threads.

    An interleave's threads run all that lies below it, a parallel map's only the map.
    """
    times = [visits * model.operators[name].self_ns for name, visits in stage]
    first = model.operators[stage[0][0]]
    if first.way == "interleave":
        return sum(times) / settings[first.name]
    lanes = settings[first.name] if first.way == "parallel" else 1.0
    return times[0] / lanes + sum(times[1:])


def _rounded(model: Model, settings: dict[str, float]) -> dict[str, int]:
    return {o.name: max(o.low, round(settings[o.name])) for o in model.tunable()}


SEARCHES: dict[str, Search] = {
    "hill_climb": hill_climb,
    "gradient": gradient,
    "stage_based": stage_based,
}

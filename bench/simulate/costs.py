"""How long a step takes. Two ways to know: a device's figures, or a line through measurements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from deltaserve.bench.simulate.system import GB, Measured, System
from deltaserve.engine.scheduler import StepPlan


@dataclass(frozen=True)
class Shape:
    """What the time of a step depends on. prompt: tokens of prompts (or computed again); drawn:
    rows of one token; deltas: distinct ones; context: tokens whose keys and values are read;
    pairs: of a token and one that it attends to."""

    prompt: int
    drawn: int
    deltas: int
    context: int
    pairs: int

    @classmethod
    def of(cls, plan: StepPlan) -> Shape:
        prompt = drawn = context = pairs = 0
        for row in plan.rows:
            if row.num_new == 1:
                drawn += 1
            else:
                prompt += row.num_new
            context += row.start + row.num_new
            pairs += row.num_new * row.start + row.num_new * (row.num_new + 1) // 2
        deltas = len({row.seq.slot for row in plan.rows} - {0})  # 0 is the base
        return cls(prompt, drawn, deltas, context, pairs)


Costs = Callable[[Shape], float]


def costs_of(system: System) -> Costs:
    """Seconds of a step of this shape."""
    if system.measured is not None:
        return _line(system.measured)
    return _roofline(system)


def _line(found: Measured) -> Costs:
    def seconds(shape: Shape) -> float:
        return (
            found.step
            + found.prompt_token * shape.prompt
            + found.drawn_token * shape.drawn
            + found.delta * shape.deltas
        )

    return seconds


def _roofline(system: System) -> Costs:
    """Bytes or arithmetic, whichever takes longer: a step reads the base, each distinct delta and
    the KV of its rows once, and multiplies each token with base and delta."""
    device, base, deltas = system.device, system.base, system.deltas
    bandwidth = device.bandwidth_gbs * GB * device.bandwidth_share * device.count
    speed = device.tflops * 1e12 * device.flops_share * device.count
    delta_bytes = deltas.bytes_of(deltas.step_gb)
    parameters = (base.billions - base.embedding_billions) * 1e9
    fixed = device.step_s + (device.layer_s * base.layers if device.count > 1 else 0.0)

    def seconds(shape: Shape) -> float:
        tokens = shape.prompt + shape.drawn
        read = base.step_bytes + shape.deltas * delta_bytes + shape.context * base.kv_bytes
        with_delta = 2.0 if shape.deltas else 1.0
        linear = 2 * parameters * tokens * with_delta
        attention = 4 * base.layers * base.hidden * shape.pairs
        return fixed + max(read / bandwidth, (linear + attention) / speed)

    return seconds

"""Projections of one input as one layer, and what stands in the model in their places."""

from __future__ import annotations

from itertools import accumulate, pairwise

import torch
from torch import nn

from deltaserve.engine.embedding_layer import DeltaEmbedding
from deltaserve.engine.layers import DeltaLinear
from deltaserve.engine.norm_layer import DeltaNorm
from deltaserve.engine.routing import StepContext


class SharedProjections:
    """Projections of one input (q, k and v; gate and up) computed as one, on behalf of the
    modules that stand in their places and each take their part of the outputs."""

    def __init__(self, layer: DeltaLinear) -> None:
        self.layer = layer
        self._input: torch.Tensor | None = None
        self._output: torch.Tensor | None = None

    def outputs(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """x [..., T, K] -> [..., T, end - start]. Computed when ``x`` is first seen."""
        if x is not self._input:
            self._input, self._output = x, self.layer(x)
        assert self._output is not None
        output = self._output
        if end == output.shape[-1]:  # nobody else will ask: the step's memory is free
            self._input = self._output = None
        return output[..., start:end]


class ProjectionPart(nn.Module):
    """Stands where the model has one of several projections of one input."""

    def __init__(self, shared: SharedProjections, start: int, end: int) -> None:
        super().__init__()
        self.shared = shared
        self.start = start
        self.end = end

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.shared.outputs(x, self.start, self.end)


DeltaModule = DeltaLinear | DeltaEmbedding | DeltaNorm
"""What computes for all deltas."""
Wrapper = DeltaModule | ProjectionPart
"""What stands in the model in place of one of its modules."""


def part_of(module: Wrapper) -> tuple[DeltaModule, int]:
    """The layer that computes a module of the model, and where among its outputs."""
    if isinstance(module, ProjectionPart):
        return module.shared.layer, module.start
    return module, 0


def share(projections: list[nn.Linear], step: StepContext, path: str) -> list[ProjectionPart]:
    """One layer of all outputs, side by side; nothing keeps the old weights."""
    whole = nn.Linear(1, 1, bias=False, device="meta")
    whole.weight = nn.Parameter(torch.cat([p.weight for p in projections]), requires_grad=False)
    whole.out_features, whole.in_features = whole.weight.shape
    if projections[0].bias is not None:
        whole.bias = nn.Parameter(torch.cat([p.bias for p in projections]), requires_grad=False)
    shared = SharedProjections(DeltaLinear(whole, step, path))
    ends = list(accumulate(len(p.weight) for p in projections))
    return [ProjectionPart(shared, start, end) for start, end in pairwise([0, *ends])]

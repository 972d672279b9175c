"""Layers that compute the base once for the whole batch and then correct each delta's rows.

Each wraps the Hugging Face module that it replaces. ``prepare`` makes of a changed parameter
what the layer wants, in any thread; ``attach`` gives it to a slot, between two steps and in no
time; ``detach`` takes everything of a slot away again.
T packed tokens, K inputs, N outputs, V vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import nn

from deltaserve.artifact.codecs.base import Encoded
from deltaserve.engine.routing import Segment, StepContext
from deltaserve.kernels.delta_embedding import delta_embedding
from deltaserve.kernels.delta_matmul import GroupedDeltas, LaidOut, RowChunks, delta_matmul

# Rows that the tables of norms grow by.
TABLE_STEP = 16


class DeltaLinear(nn.Module):
    """A projection; weight and bias may change.

    name: its path in the model, for messages. grouped: the weights that a kernel applies for
    all deltas at once; the others are in ``weights``.
    """

    def __init__(self, inner: nn.Linear, step: StepContext, name: str) -> None:
        super().__init__()
        self.inner = inner
        self.step = step
        self.grouped = GroupedDeltas(f"{name}.weight", inner.weight, inner.bias is not None)
        self.weights: dict[int, Encoded] = {}
        self.biases: dict[int, torch.Tensor] = {}
        self.num_outputs: dict[int, int] = {}

    def prepare(self, parameter: str, operand: Encoded) -> Encoded | LaidOut:
        laid_out = self.grouped.prepare(operand) if parameter == "weight" else None
        return operand if laid_out is None else laid_out

    def attach(self, slot: int, parameter: str, operand: Encoded | LaidOut) -> None:
        """A second weight takes the place of the first."""
        if isinstance(operand, LaidOut):
            self.num_outputs[slot] = operand.enc.shape[0]
            self.grouped.put(slot, operand)
            self.weights.pop(slot, None)
        elif parameter == "bias":
            self.biases[slot] = operand.tensors["values"]
        else:
            self.num_outputs[slot] = operand.shape[0]
            self.grouped.detach(slot)
            self.weights[slot] = operand

    def detach(self, slot: int) -> None:
        self.grouped.detach(slot)
        for held in (self.weights, self.biases, self.num_outputs):
            held.pop(slot, None)

    def segments(self) -> Iterable[Segment]:
        return self.step.routing.tokens

    def chunks(self) -> RowChunks:
        return self.step.routing.token_chunks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., T, K] -> [..., T, N]; the leading dimensions are 1."""
        return self.compute(x, self.inner.weight.shape[0])

    def compute(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """The base where it is needed, then each delta -> [..., T, width >= N]."""
        x_TK = x.view(-1, x.shape[-1])
        spans = self.base_spans(len(x_TK))
        num_outputs = self.inner.weight.shape[0]
        if spans == [(0, len(x_TK))] and width == num_outputs:
            y_TN = F.linear(x_TK, self.inner.weight, self.inner.bias)
        else:
            y_TN = x_TK.new_zeros(len(x_TK), width)
            for start, end in spans:
                part = F.linear(x_TK[start:end], self.inner.weight, self.inner.bias)
                y_TN[start:end, :num_outputs] = part
        self.correct(x_TK, y_TN)
        return y_TN.view(*x.shape[:-1], width)

    def base_spans(self, num_rows: int) -> list[tuple[int, int]]:
        """Runs of rows that need the base's output: all but those with a whole weight of their
        own, for which it would be overwritten."""
        spans, begin = [], 0
        for segment in self.segments():
            weight = self.weights.get(segment.slot)
            if weight is not None and weight.codec == "raw":
                if begin < segment.start:
                    spans.append((begin, segment.start))
                begin = segment.end
        return [*spans, (begin, num_rows)] if begin < num_rows else spans

    def correct(self, x_TK: torch.Tensor, y_TN: torch.Tensor) -> None:
        for segment in self.segments():
            rows = slice(segment.start, segment.end)
            bias = self.biases.get(segment.slot)
            if bias is not None:
                y_TN[rows] += bias - self.inner.bias
            weight = self.weights.get(segment.slot)
            if weight is not None:
                own_bias = self.inner.bias if bias is None else bias
                delta_matmul(y_TN[rows, : weight.shape[0]], x_TK[rows], weight, own_bias)
        if self.grouped:
            self.grouped.apply(y_TN, x_TK, self.chunks())


class DeltaHead(DeltaLinear):
    """The output projection: sees only rows whose logits are kept, and vocabularies may differ."""

    def segments(self) -> Iterable[Segment]:
        return self.step.routing.logits

    def chunks(self) -> RowChunks:
        return self.step.routing.logit_chunks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits as wide as the widest vocabulary in the step; the runner masks what is
        beyond a row's own."""
        own = [self.num_outputs.get(segment.slot, 0) for segment in self.segments()]
        return self.compute(x, max([self.inner.weight.shape[0], *own]))


class DeltaEmbedding(nn.Module):
    """Token embeddings; added tokens lie past the base's rows."""

    def __init__(self, inner: nn.Embedding, step: StepContext) -> None:
        super().__init__()
        self.inner = inner
        self.step = step
        self.weights: dict[int, Encoded] = {}

    def prepare(self, parameter: str, operand: Encoded) -> Encoded:
        return operand

    def attach(self, slot: int, parameter: str, operand: Encoded) -> None:
        self.weights[slot] = operand

    def detach(self, slot: int) -> None:
        self.weights.pop(slot, None)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [1, T] -> [1, T, D], scaled where the model scales (Gemma 3)."""
        weight_VD = self.inner.weight
        out: torch.Tensor = self.inner(ids.clamp(max=weight_VD.shape[0] - 1))
        scale: torch.Tensor | None = getattr(self.inner, "embed_scale", None)
        for segment in self.step.routing.tokens:
            operand = self.weights.get(segment.slot)
            if operand is None:
                continue
            rows = slice(segment.start, segment.end)
            own_TD = delta_embedding(ids[0, rows], weight_VD, operand)
            out[0, rows] = own_TD if scale is None else own_TD * scale.to(own_TD.dtype)
        return out


class DeltaNorm(nn.Module):
    """A normalisation; each row is scaled by its own delta's weight.

    token_dim: which dimension of the input counts the packed tokens (q/k norms see
    [1, T, heads, D] in Qwen 3 and [1, heads, T, D] in Gemma 3). table_SD: one row per slot, the
    base's where a delta does not change this norm. The last row is always the base's: higher
    slots are clamped to it.
    """

    def __init__(self, inner: nn.Module, step: StepContext, token_dim: int) -> None:
        super().__init__()
        self.base_weight: torch.Tensor = inner.get_parameter("weight").detach()
        # A plain attribute from here on, so that each step can put its own rows in its place.
        del inner._parameters["weight"]
        self.inner = inner
        self.step = step
        self.token_dim = token_dim
        self.weights: dict[int, torch.Tensor] = {}
        self.table_SD = self.base_weight[None].clone()

    def prepare(self, parameter: str, operand: Encoded) -> Encoded:
        return operand

    def attach(self, slot: int, parameter: str, operand: Encoded) -> None:
        """One row of the table, which grows by whole steps: cheap however many slots there are."""
        self.weights[slot] = operand.tensors["values"]
        missing = slot + 2 - len(self.table_SD)
        if missing > 0:
            more = -(-missing // TABLE_STEP) * TABLE_STEP
            self.table_SD = torch.cat([self.table_SD, self.base_weight.expand(more, -1)])
        self.table_SD[slot] = operand.tensors["values"]

    def detach(self, slot: int) -> None:
        if self.weights.pop(slot, None) is not None:
            self.table_SD[slot] = self.base_weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.inner.weight = self._weight_for(x)
        y: torch.Tensor = self.inner(x)
        return y

    def _weight_for(self, x: torch.Tensor) -> torch.Tensor:
        routing = self.step.routing
        if not any(segment.slot in self.weights for segment in routing.tokens):
            return self.base_weight
        shape = [1] * x.dim()
        shape[self.token_dim], shape[-1] = len(routing.slot_T), x.shape[-1]
        return self.table_SD[routing.slot_T.clamp(max=len(self.table_SD) - 1)].view(shape)


DeltaModule = DeltaLinear | DeltaEmbedding | DeltaNorm

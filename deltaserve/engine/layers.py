"""Layers that compute the base once for the whole batch and then correct each delta's rows:
projections and the head here, ``embedding_layer`` and ``norm_layer``.

Each wraps the Hugging Face module that it replaces. ``prepare`` makes of a changed parameter
what the layer wants, in any thread; ``attach`` gives it to a slot, between two steps and in no
time; ``detach`` takes everything of a slot away again.
T packed tokens, K inputs, N outputs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import nn

from deltaserve.artifact.codecs.base import Encoded
from deltaserve.artifact.manifest import TensorEntry
from deltaserve.engine.delta_layer import DeltaLayer
from deltaserve.engine.pieces import Piece, Pieces, Rest, apart, for_kernels, join, no_rest
from deltaserve.engine.routing import Segment, StepContext
from deltaserve.engine.slot_table import SlotTable
from deltaserve.kernels import dense
from deltaserve.kernels.delta_matmul import GroupedDeltas, LaidOut, RowChunks, delta_matmul, int4

MERGED = "merged"
"""What ``attach`` calls a whole weight, base + delta, kept beside the packed one."""
MERGED_ROWS = 8
"""From so many rows of a delta in a step on, one matmul with base + delta is faster on a CPU than
the base's and the packed delta's. Measured on a 30 M model with 32 rows in bfloat16, two cores: a
step takes as long either way with 8 deltas of 4 rows, and 32.5 ms against 36.0 with 4 of 8."""


class DeltaLinear(DeltaLayer):
    """A projection, or several of one input side by side; weight and bias may change.

    name: its path in the model, for messages. base_NK: the base's weight, which on a CPU may be
    packed (``pack``): then ``inner.weight`` has its shape only. grouped: the weights that a kernel
    applies for all deltas at once (``laid_out``), and shifts the biases less the base's; the others
    are in ``weights`` and ``biases``. unpackable: those of ``weights`` that segments of
    ``dense_rows`` have added to the base's. merged: whole weights, for segments of several rows.
    replaced: slots whose own weights replace all of the base's outputs.
    """

    def __init__(self, inner: nn.Linear, step: StepContext, name: str) -> None:
        super().__init__(step)
        self.inner = inner
        self.quantised = type(inner) is not nn.Linear
        self.base_NK = inner.weight.detach()
        self.base_bias_N: torch.Tensor | None = None if inner.bias is None else inner.bias.detach()
        self.grouped = GroupedDeltas(f"{name}.weight", like(inner), inner.bias is not None)
        self.laid_out: dict[int, tuple[Piece, ...]] = {}
        self.shifts: SlotTable | None = None
        if inner.bias is not None:
            self.shifts = SlotTable(torch.zeros_like(inner.bias))
        self.weights: dict[int, Pieces] = {}
        self.unpackable: dict[int, Pieces] = {}
        self.dense_rows = int4.dense_rows(inner.weight.dtype)
        self.merged: dict[int, torch.Tensor] = {}
        self.biases: dict[int, torch.Tensor] = {}
        self.num_outputs: dict[int, int] = {}
        self.replaced: set[int] = set()

    def pack(self) -> None:
        """Reorder the base's weight for this processor's matmul, where it has an order of its
        own. The plain one is freed, unless it serves something else too."""
        if not self.quantised and dense.packs(self.base_NK):
            self.base_NK = dense.pack(self.base_NK)
            shape_only = torch.empty(1, dtype=self.base_NK.dtype).expand(self.base_NK.shape)
            self.inner.weight = nn.Parameter(shape_only, requires_grad=False)
            self.grouped.base_NK = shape_only

    def prepare(self, parameter: str, pieces: Pieces, rest: Rest = no_rest) -> Pieces:
        """What ``attach`` shall keep: laid out as this device computes. rest: called between
        slices of the work."""
        if parameter == "bias":
            return pieces
        if parameter == MERGED:
            return (self._whole(pieces),)
        dtype = self.grouped.base_NK.dtype
        pieces = tuple(Piece(p.start, enc) for p in pieces for enc in apart(p.enc, dtype))
        if self.grouped.serves_layer():
            return for_kernels(pieces, self.grouped)
        return join(pieces, dtype, rest) if self.packs_on_cpu() else pieces

    def packs_on_cpu(self) -> bool:
        """Whether operands are laid out for the CPU's own operators."""
        return self.grouped.base_NK.device.type == "cpu" and not self.grouped.serves_layer()

    def merged_bytes(self, entries: Sequence[TensorEntry]) -> int:
        """Size of the whole weight of a fine-tune that changes ``entries`` of it."""
        rows = max(self.num_base_outputs, *(entry.shape[0] for entry in entries))
        return rows * self.inner.in_features * self.inner.weight.itemsize

    def _whole(self, values: Pieces) -> Piece:
        """The fine-tune's weight [N, K], from the values of what it changes."""
        whole_NK = dense.unpack(self.base_NK)
        more = max(piece.outputs.stop for piece in values) - len(whole_NK)
        if more > 0:
            whole_NK = torch.cat([whole_NK, whole_NK.new_zeros(more, whole_NK.shape[1])])
        for piece in values:
            whole_NK[piece.outputs] = piece.values
        if dense.packs(whole_NK):
            whole_NK = dense.pack(whole_NK)
        shape = tuple(whole_NK.shape)
        return Piece(0, Encoded("raw", {}, shape, whole_NK.dtype, {"values": whole_NK}))

    def attach(self, slot: int, parameter: str, pieces: Pieces) -> None:
        if parameter == "bias":
            self._attach_bias(slot, pieces)
        elif parameter == MERGED:
            self.merged[slot] = pieces[0].values
            self.grouped.detach(slot)
            self._leave_graphs(slot)
        else:
            self._attach_weight(slot, pieces)

    def _attach_bias(self, slot: int, pieces: Pieces) -> None:
        own_N = self.inner.bias.clone()
        for piece in pieces:
            own_N[piece.outputs] = piece.values
        if self.grouped.serves_layer() and self.shifts is not None:
            self.step.changes += self.shifts.put(slot, own_N - self.inner.bias)
        else:
            self.biases[slot] = own_N
            self._leave_graphs(slot)

    def _attach_weight(self, slot: int, pieces: Pieces) -> None:
        self.num_outputs[slot] = max(piece.outputs.stop for piece in pieces)
        laid_out = tuple(p for p in pieces if isinstance(p.operand, LaidOut))
        if laid_out:
            self.laid_out[slot] = laid_out
            self._put(slot)
        others = tuple(p for p in pieces if not isinstance(p.operand, LaidOut))
        if others:
            self.weights[slot] = others
            if unpackable := self.unpackable_of(others):
                self.unpackable[slot] = unpackable
            self._leave_graphs(slot)
        raw = sum(piece.enc.shape[0] for piece in others if piece.enc.codec == "raw")
        if raw >= self.num_base_outputs:
            self.replaced.add(slot)

    def unpackable_of(self, pieces: Iterable[Piece]) -> Pieces:
        """Those that can be added to the base's weight for a step."""
        if self.quantised or not self.packs_on_cpu():
            return ()
        within = (p for p in pieces if p.outputs.stop <= self.num_base_outputs)
        return tuple(piece for piece in within if int4.unpacks(piece.enc))

    def _put(self, slot: int) -> None:
        before = self.grouped.changes
        for piece in self.laid_out[slot]:
            assert isinstance(piece.operand, LaidOut)
            self.grouped.put(slot, piece.operand, piece.start)
        self.step.changes += self.grouped.changes - before

    def _leave_graphs(self, slot: int) -> None:
        """Rows of this slot are computed by its own calls, which a captured step does not hold."""
        self.step.eager.add(slot)

    def detach_merged(self, slot: int) -> None:
        if self.merged.pop(slot, None) is not None and slot in self.laid_out:
            self._put(slot)

    def detach(self, slot: int) -> None:
        self.grouped.detach(slot)
        for held in (self.laid_out, self.weights, self.unpackable, self.merged, self.biases):
            held.pop(slot, None)
        self.num_outputs.pop(slot, None)
        if self.shifts is not None:
            self.shifts.drop(slot)
        self.replaced.discard(slot)
        self.step.eager.discard(slot)
        self.forget_arrival(slot)

    def reads_at_attach(self, parameter: str) -> bool:
        return parameter == "bias"

    def segments(self) -> Iterable[Segment]:
        return self.step.routing.tokens

    def chunks(self) -> RowChunks:
        return self.step.routing.token_chunks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., T, K] -> [..., T, N]; the leading dimensions are 1."""
        return self.compute(x, self.num_base_outputs)

    def compute(self, x: torch.Tensor, width: int) -> torch.Tensor:
        """The base where it is needed, then each delta -> [..., T, width >= N]."""
        self.await_operands()
        x_TK = x.view(-1, x.shape[-1])
        spans = self.base_spans(len(x_TK))
        num_outputs = self.num_base_outputs
        if spans == [(0, len(x_TK))] and width == num_outputs:
            y_TN = self.base(x_TK)
        else:
            y_TN = x_TK.new_zeros(len(x_TK), width)
            for start, end in spans:
                y_TN[start:end, :num_outputs] = self.base(x_TK[start:end])
        self.correct(x_TK, y_TN)
        return y_TN.view(*x.shape[:-1], width)

    @property
    def num_base_outputs(self) -> int:
        return self.inner.out_features

    def base(self, x_TK: torch.Tensor) -> torch.Tensor:
        """The base's output [T, N]."""
        if self.quantised:
            y_TN: torch.Tensor = self.inner(x_TK)
            return y_TN
        return dense.linear(x_TK, self.base_NK, self.base_bias_N)

    def base_spans(self, num_rows: int) -> list[tuple[int, int]]:
        """Runs of rows that need the base's output: all but those with a whole weight of their
        own, for which it would be overwritten."""
        if not self.replaced and not self.merged and not self._many_rows():
            return [(0, num_rows)]
        spans, begin = [], 0
        for segment in self.segments():
            own = segment.slot in self.replaced or self._runs_merged(segment)
            if own or self._runs_unpacked(segment):
                if begin < segment.start:
                    spans.append((begin, segment.start))
                begin = segment.end
        return [*spans, (begin, num_rows)] if begin < num_rows else spans

    def _runs_merged(self, segment: Segment) -> bool:
        """A kernel that applies packed weights is not compared: what is merged there, runs so."""
        slot, rows = segment.slot, segment.end - segment.start
        return slot in self.merged and (rows >= MERGED_ROWS or slot in self.laid_out)

    def _many_rows(self) -> bool:
        """A delta may have so many that its packed weights are worth unpacking."""
        return bool(self.unpackable) and self.step.routing.longest >= self.dense_rows

    def _runs_unpacked(self, segment: Segment) -> bool:
        return segment.end - segment.start >= self.dense_rows and segment.slot in self.unpackable

    def unpacked(self, pieces: Pieces) -> torch.Tensor:
        """base + pieces [N, K], dense: for one matmul."""
        whole_NK = dense.unpack(self.base_NK)
        for piece in pieces:
            int4.add_to(whole_NK[piece.outputs], piece.enc)
        return whole_NK

    def correct(self, x_TK: torch.Tensor, y_TN: torch.Tensor) -> None:
        if self.weights or self.biases or self.merged:
            for segment in self.segments():
                self._correct_rows(segment, x_TK, y_TN)
        if self.grouped.tables:
            self.grouped.apply(y_TN, x_TK, self.chunks())
        if self.shifts is not None and self.step.routing.has_any(self.shifts.slots):
            y_TN += self.shifts.of(self.step.routing.slot_T)

    def _correct_rows(self, segment: Segment, x_TK: torch.Tensor, y_TN: torch.Tensor) -> None:
        """The rows of one delta. Called for each of them in each layer: by Python, a good part of
        a step on a CPU."""
        slot, start, end = segment.slot, segment.start, segment.end
        own_N = self.biases.get(slot, self.base_bias_N)
        if self.merged and self._runs_merged(segment):
            merged_NK = self.merged[slot]
            y_TN[start:end, : len(merged_NK)] = dense.linear(x_TK[start:end], merged_NK, own_N)
            return
        pieces = self.weights.get(slot, ())
        if self.unpackable and self._runs_unpacked(segment):
            whole_NK = self.unpacked(self.unpackable[slot])
            y_TN[start:end, : len(whole_NK)] = dense.linear(x_TK[start:end], whole_NK, own_N)
            pieces = tuple(piece for piece in pieces if piece not in self.unpackable[slot])
        elif slot in self.biases and self.base_bias_N is not None:
            shift_N = self.biases[slot] - self.base_bias_N
            y_TN[start:end, : len(shift_N)] += shift_N
        if not pieces:
            return
        x_SK, y_SN = x_TK[start:end], y_TN[start:end]
        width = y_TN.shape[1]
        for piece in pieces:
            out, enc = piece.outputs, piece.enc
            part = y_SN if enc.shape[0] == width else y_SN[:, out]
            delta_matmul(part, x_SK, enc, None if own_N is None else own_N[out])


class DeltaHead(DeltaLinear):
    """The output projection: sees only rows whose logits are kept, and vocabularies may differ."""

    def __init__(self, inner: nn.Linear, step: StepContext, name: str) -> None:
        super().__init__(inner, step, name)
        self.shifts = None  # they follow the packed tokens

    def segments(self) -> Iterable[Segment]:
        return self.step.routing.logits

    def chunks(self) -> RowChunks:
        return self.step.routing.logit_chunks

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits as wide as the widest vocabulary in the step; the runner masks what is
        beyond a row's own."""
        own = [self.num_outputs.get(segment.slot, 0) for segment in self.segments()]
        return self.compute(x, max([self.num_base_outputs, *own]))

    def _leave_graphs(self, slot: int) -> None:
        """It stands behind what is captured."""

    def unpackable_of(self, pieces: Iterable[Piece]) -> Pieces:
        """None: its weight is too large to be copied for a step."""
        return ()


def like(inner: nn.Linear) -> torch.Tensor:
    """[N, K] of the layer's computing dtype, where it is. Of quantised weights without memory."""
    if type(inner) is nn.Linear:
        return inner.weight
    weight = inner.weight
    dtype: torch.dtype = getattr(inner, "compute_dtype", None) or torch.bfloat16
    empty = torch.empty(1, dtype=dtype, device=weight.device)
    return empty.expand(inner.out_features, inner.in_features)

"""One layer's deltas as the grouped kernels take them. T rows, K inputs, N outputs, S slots."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from deltaserve.artifact.codecs.base import Encoded
from deltaserve.kernels.delta_matmul import dispatch, reference
from deltaserve.kernels.delta_matmul.chunks import RowChunks
from deltaserve.kernels.delta_matmul.layout import FIELDS, Kind, Operand, lay_out

# Tables grow by whole steps, so that their addresses seldom change.
TABLE_STEP = 64


@dataclass(eq=False)
class Table:
    """The operands of one kind, by slot.

    addresses_SF int64: fields of each slot's operand, zeros where there is none. scale_S float32.
    """

    addresses_SF: torch.Tensor
    scale_S: torch.Tensor
    operands: dict[int, Operand] = field(default_factory=dict)

    @classmethod
    def empty(cls, device: torch.device) -> Table:
        addresses_SF = torch.zeros(TABLE_STEP, FIELDS, dtype=torch.int64, device=device)
        return cls(addresses_SF, torch.zeros(TABLE_STEP, device=device))

    @property
    def num_outputs(self) -> int:
        """Of the widest operand."""
        return max(operand.num_outputs for operand in self.operands.values())

    def put(self, slot: int, operand: Operand) -> None:
        missing = slot + 1 - len(self.scale_S)
        if missing > 0:
            more = -(-missing // TABLE_STEP) * TABLE_STEP
            self.addresses_SF = F.pad(self.addresses_SF, (0, 0, 0, more))
            self.scale_S = F.pad(self.scale_S, (0, more))
        fields = (*operand.fields, *[0] * (FIELDS - len(operand.fields)))
        self.addresses_SF[slot] = torch.tensor(fields)
        self.scale_S[slot] = operand.scale
        self.operands[slot] = operand

    def drop(self, slot: int) -> None:
        if self.operands.pop(slot, None) is not None:
            self.addresses_SF[slot] = 0


class GroupedDeltas:
    """The weights of one layer that kernels apply, for all deltas of a step at once."""

    def __init__(self, name: str, base_NK: torch.Tensor, bias: bool) -> None:
        """name: the parameter, for messages. base_NK: the base's. bias: whether it has one."""
        self.name = name
        self.base_NK = base_NK
        self.bias = bias
        self.tables: dict[Kind, Table] = {}

    def __len__(self) -> int:
        return sum(len(table.operands) for table in self.tables.values())

    def attach(self, slot: int, enc: Encoded) -> bool:
        """Lay the operand out for its kernel and put it there; False if none takes it."""
        operand = self.prepare(enc) if self.serves_layer() else None
        if operand is not None:
            self.put(slot, operand)
        return operand is not None

    def serves_layer(self) -> bool:
        """Whether there are kernels for this layer's device and dtype."""
        return dispatch.has_kernels(self.base_NK)

    def prepare(self, enc: Encoded) -> Operand | None:
        """The operand as its kernel wants it, None if no kernel takes it. In any thread."""
        if not dispatch.takes_kernel(self.name, enc, self.base_NK.dtype, bias=self.bias):
            return None
        return lay_out(enc)

    def put(self, slot: int, operand: Operand) -> None:
        """Cheap: an entry in a table."""
        self.tables.setdefault(operand.kind, Table.empty(self.base_NK.device)).put(slot, operand)

    def detach(self, slot: int) -> None:
        for kind, table in list(self.tables.items()):
            table.drop(slot)
            if not table.operands:
                del self.tables[kind]

    def apply(self, y_TN: torch.Tensor, x_TK: torch.Tensor, chunks: RowChunks) -> None:
        """Turn y, the base's output for x, into that of each row's delta, in place.

        Only kinds that occur in the step are launched. y may be wider than the base's N.
        """
        # Here, because machines without a GPU need no Triton.
        from deltaserve.kernels.delta_matmul import launch

        for kind, table in self.tables.items():
            if not chunks.slots.isdisjoint(table.operands):
                launch.grouped(kind, table, y_TN, x_TK, chunks, len(self.base_NK))
            for segment in chunks.dense:
                operand = table.operands.get(segment.slot)
                if operand is not None:
                    rows = slice(segment.start, segment.end)
                    _apply_dense(operand, y_TN[rows, : operand.enc.shape[0]], x_TK[rows])


def _apply_dense(operand: Operand, y_TN: torch.Tensor, x_TK: torch.Tensor) -> None:
    """Many rows of one delta: its weight is unpacked once and the library multiplies."""
    from deltaserve.kernels.delta_matmul import launch

    if operand.kind.codec in ("lowrank", "rows"):
        reference.delta_matmul(y_TN, x_TK, operand.enc)
        return
    dense_NK = launch.dequantised(operand, x_TK.shape[1], x_TK.dtype)
    if operand.kind.indexed:
        y_TN.index_add_(1, operand.parts[2].long(), F.linear(x_TK, dense_NK))
    else:
        y_TN.addmm_(x_TK, dense_NK.T)

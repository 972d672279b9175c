"""One layer's deltas as the grouped kernels take them. T rows, K inputs, N outputs, S slots."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from deltaserve.artifact.codecs.base import Encoded
from deltaserve.kernels.delta_matmul import dispatch
from deltaserve.kernels.delta_matmul.chunks import RowChunks
from deltaserve.kernels.delta_matmul.dense import apply_dense
from deltaserve.kernels.delta_matmul.layout import FIELDS, Kind, Operand, lay_out
from deltaserve.kernels.staging import to_device

# Tables grow by whole steps, so that their addresses seldom change.
TABLE_STEP = 64


@dataclass(eq=False)
class Table:
    """The operands of one kind, by slot.

    addresses_SF int64: fields of each slot's operand, zeros where there is none. scale_S float32.
    num_outputs, rank: of the widest operand that there ever was, so that launches seldom change.
    """

    addresses_SF: torch.Tensor
    scale_S: torch.Tensor
    operands: dict[int, Operand] = field(default_factory=dict)
    num_outputs: int = 0
    rank: int = 0

    @classmethod
    def empty(cls, device: torch.device) -> Table:
        addresses_SF = torch.zeros(TABLE_STEP, FIELDS, dtype=torch.int64, device=device)
        return cls(addresses_SF, torch.zeros(TABLE_STEP, device=device))

    def put(self, slot: int, operand: Operand) -> bool:
        """Whether launches change with it: the table moved, was empty, or the grid is too small."""
        before = (bool(self.operands), self.num_outputs, self.rank, len(self.scale_S))
        missing = slot + 1 - len(self.scale_S)
        if missing > 0:
            more = -(-missing // TABLE_STEP) * TABLE_STEP
            self.addresses_SF = F.pad(self.addresses_SF, (0, 0, 0, more))
            self.scale_S = F.pad(self.scale_S, (0, more))
        fields = (*operand.fields, *[0] * (FIELDS - len(operand.fields)))
        self.addresses_SF[slot] = to_device(torch.tensor(fields), self.addresses_SF.device)
        self.scale_S[slot] = operand.scale  # a fill: the number is an argument of the kernel
        self.operands[slot] = operand
        self.num_outputs = max(self.num_outputs, operand.num_outputs)
        if operand.ranks:
            self.rank = max(self.rank, len(operand.parts[0]))
        return before != (True, self.num_outputs, self.rank, len(self.scale_S))

    @property
    def slots(self) -> tuple[torch.Tensor, int]:
        """The addresses, and of how many slots."""
        return self.addresses_SF, len(self.addresses_SF)

    def drop(self, slot: int) -> None:
        if self.operands.pop(slot, None) is not None:
            self.addresses_SF[slot] = 0


class GroupedDeltas:
    """The weights of one layer that kernels apply, for all deltas of a step at once.

    tables: by kind, by the output at which their operands start, and by how many of that kind the
    same delta has there before it (the terms of a sum). changes: how often captured
    launches of this layer have become wrong.
    """

    def __init__(self, name: str, base_NK: torch.Tensor, bias: bool) -> None:
        """name: the parameter, for messages. base_NK: the base's. bias: whether it has one."""
        self.name = name
        self.base_NK = base_NK
        self.bias = bias
        self.tables: dict[tuple[Kind, int, int], Table] = {}
        self.changes = 0

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
        return dispatch.has_kernels(self.name, self.base_NK)

    def prepare(self, *encs: Encoded) -> Operand | None:
        """The operand as its kernel wants it, None if no kernel takes it. In any thread.

        Several encs are weights that stand side by side, if they are ``joinable``.
        """
        dtype = self.base_NK.dtype
        takes = [dispatch.takes_kernel(self.name, enc, dtype, bias=self.bias) for enc in encs]
        return lay_out(*encs) if all(takes) else None

    def put(self, slot: int, operand: Operand, start: int = 0) -> None:
        """Cheap: an entry in a table. start: the first output that the operand changes."""
        key = operand.kind, start, 0
        while key in self.tables and slot in self.tables[key].operands:
            key = operand.kind, start, key[2] + 1
        new = key not in self.tables
        table = self.tables.setdefault(key, Table.empty(self.base_NK.device))
        self.changes += table.put(slot, operand) or new

    def detach(self, slot: int) -> None:
        """Tables stay when they are empty: they will be needed again."""
        for table in self.tables.values():
            table.drop(slot)

    def apply(self, y_TN: torch.Tensor, x_TK: torch.Tensor, chunks: RowChunks) -> None:
        """Turn y, the base's output for x, into that of each row's delta, in place.

        Only kinds that occur in the step are launched. y may be wider than the base's N.
        """
        # Here, because machines without a GPU need no Triton.
        from deltaserve.kernels.delta_matmul import launch

        for (kind, start, _), table in self.tables.items():
            if table.operands and chunks.touch(table.operands):
                launch.grouped(kind, table, y_TN[:, start:], x_TK, chunks, len(self.base_NK))
            for segment in chunks.dense:
                operand = table.operands.get(segment.slot)
                if operand is not None:
                    rows = slice(segment.start, segment.end)
                    columns = slice(start, start + operand.enc.shape[0])
                    apply_dense(operand, y_TN[rows, columns], x_TK[rows])

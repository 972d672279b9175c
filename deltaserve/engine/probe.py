"""What merging a delta saves, measured on its own operands and the base's layers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from deltaserve.engine.layers import MERGED_ROWS, DeltaLinear
from deltaserve.engine.operands import MERGEABLE, Operands
from deltaserve.engine.pieces import Piece, Pieces
from deltaserve.kernels import dense
from deltaserve.kernels.delta_matmul import LaidOut, delta_matmul, int4

ROWS = (MERGED_ROWS, 4 * MERGED_ROWS, 8 * MERGED_ROWS, 32 * MERGED_ROWS)
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Savings:
    """Seconds that a step saves when a delta with so many rows in it is merged."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, rows: int) -> float:
        """Between measured numbers of rows a straight line, beyond the last as that; nothing
        below the first, where the packed weights serve."""
        if rows < self.rows[0]:
            return 0.0
        return float(np.interp(rows, self.rows, self.seconds))


# Packed kernels of a GPU are not measured: the delta with the most rows comes first.
BY_ROWS = Savings((0, 4096), (0.0, 1.0))


class Prober:
    """Measures each kind of projection once: base and packed correction against one whole
    weight."""

    def __init__(self) -> None:
        self._measured: dict[str, tuple[float, ...]] = {}

    @torch.inference_mode()
    def savings(self, operands: Operands) -> Savings:
        """The sum over a delta's projections. A few milliseconds for a new kind, else nothing."""
        kinds: Counter[str] = Counter()
        for binding in operands.bindings:
            layer = binding.layer
            if any(isinstance(piece.operand, LaidOut) for piece in binding.pieces):
                return BY_ROWS
            if isinstance(layer, DeltaLinear) and binding.leaf == "weight":
                packed = [p for p in binding.pieces if p.enc.codec != "raw"]
                if not any(p.enc.codec in (*MERGEABLE, int4.CODEC) for p in packed):
                    continue
                kind = " ".join(f"{p.enc.codec} {p.enc.params} {p.enc.shape}" for p in packed)
                kinds[kind] += 1
                if kind not in self._measured:
                    self._measured[kind] = _measure(layer, packed)
        totals = [0.0] * len(ROWS)
        for kind, count in kinds.items():
            if count:
                for i, seconds in enumerate(self._measured[kind]):
                    totals[i] += count * seconds
        return Savings(ROWS, tuple(totals))


def _measure(layer: DeltaLinear, packed: list[Piece]) -> tuple[float, ...]:
    """What the packed pieces cost for each of ROWS, beside what merged rows cost: as much as the
    base's would, of which they need nothing."""
    inputs = layer.inner.weight.shape[1]
    outputs = max(layer.num_base_outputs, *(piece.outputs.stop for piece in packed))
    unpackable = layer.unpackable_of(packed)
    found = []
    for rows in ROWS:
        x_TK = torch.zeros(rows, inputs, dtype=layer.inner.weight.dtype)
        y_TN = x_TK.new_zeros(rows, outputs)
        if unpackable and rows >= layer.dense_rows:
            seconds = _best(partial(_unpacked, layer, unpackable, x_TK))
            seconds -= _best(partial(layer.base, x_TK))
            left = [piece for piece in packed if piece not in unpackable]
        else:
            seconds, left = 0.0, packed
        found.append(max(0.0, seconds + _best(partial(_correct, y_TN, x_TK, left))))
    return tuple(found)


def _unpacked(layer: DeltaLinear, pieces: Pieces, x_TK: torch.Tensor) -> None:
    dense.linear(x_TK, layer.unpacked(pieces))


def _correct(y_TN: torch.Tensor, x_TK: torch.Tensor, pieces: list[Piece]) -> None:
    for piece in pieces:
        delta_matmul(y_TN[:, piece.outputs], x_TK, piece.enc)


def _best(work: Callable[[], object]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)

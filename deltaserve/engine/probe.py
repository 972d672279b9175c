"""What merging a delta saves, measured on its own operands and the base's layers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from deltaserve.engine.layers import MERGED_ROWS, DeltaLinear
from deltaserve.engine.operands import MERGEABLE, Operands
from deltaserve.engine.pieces import Piece
from deltaserve.kernels.delta_matmul import LaidOut, delta_matmul, int4

ROWS = (MERGED_ROWS, 4 * MERGED_ROWS, 32 * MERGED_ROWS)
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
                    self._measured[kind] = _measure(layer.inner.weight, packed)
        totals = [0.0] * len(ROWS)
        for kind, count in kinds.items():
            if count:
                for i, seconds in enumerate(self._measured[kind]):
                    totals[i] += count * seconds
        return Savings(ROWS, tuple(totals))


def _measure(base_NK: torch.Tensor, packed: list[Piece]) -> tuple[float, ...]:
    """What the packed pieces cost for each of ROWS.

    Without them, merged rows cost what they cost the base, of which they need nothing: about
    even.
    """
    found = []
    for rows in ROWS:
        x_TK = torch.zeros(rows, base_NK.shape[1], dtype=base_NK.dtype)
        y_TN = torch.zeros(
            rows, max(len(base_NK), *(p.outputs.stop for p in packed)), dtype=base_NK.dtype
        )

        def work(x: torch.Tensor = x_TK, y: torch.Tensor = y_TN) -> None:
            for piece in packed:
                delta_matmul(y[:, piece.outputs], x, piece.enc)

        found.append(_best(work))
    return tuple(found)


def _best(work: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)

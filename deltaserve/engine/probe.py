"""What merging a delta saves, measured on its own operands and the base's layers."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from deltaserve.artifact.codecs.base import Encoded
from deltaserve.engine.layers import DeltaLinear
from deltaserve.engine.operands import MERGEABLE, Operands
from deltaserve.kernels.delta_matmul import LaidOut, delta_matmul

ROWS = (1, 8, 32)
REPEATS = 3


@dataclass(frozen=True, slots=True)
class Savings:
    """Seconds that a step saves when a delta with so many rows in it is merged."""

    rows: tuple[int, ...]
    seconds: tuple[float, ...]

    def of(self, rows: int) -> float:
        """Between measured numbers of rows a straight line, outside them the nearest."""
        return float(np.interp(rows, self.rows, self.seconds))


# Packed kernels of a GPU are not measured: the delta with the most rows comes first.
BY_ROWS = Savings((0, 4096), (0.0, 1.0))


class Prober:
    """Measures each kind of projection once: packed correction against dense projection."""

    def __init__(self) -> None:
        self._measured: dict[str, tuple[float, ...]] = {}

    @torch.inference_mode()
    def savings(self, operands: Operands) -> Savings:
        """The sum over a delta's projections. A few milliseconds for a new kind, else nothing."""
        kinds: Counter[str] = Counter()
        for binding in operands.bindings:
            module, operand = binding.module, binding.operand
            if isinstance(operand, LaidOut):
                return BY_ROWS
            if isinstance(module, DeltaLinear) and operand.codec in MERGEABLE:
                kind = f"{operand.codec} {operand.params} {operand.shape}"
                kinds[kind] += 1
                if kind not in self._measured:
                    self._measured[kind] = _measure(module.inner.weight, operand)
        totals = [0.0] * len(ROWS)
        for kind, count in kinds.items():
            for i, seconds in enumerate(self._measured[kind]):
                totals[i] += count * seconds
        return Savings(ROWS, tuple(totals))


def _measure(base_NK: torch.Tensor, operand: Encoded) -> tuple[float, ...]:
    """Packed minus dense, for each of ROWS. The base's own output is needed by others anyway."""
    found = []
    for rows in ROWS:
        x_TK = torch.zeros(rows, operand.shape[1], dtype=base_NK.dtype)
        y_TN = torch.zeros(rows, operand.shape[0], dtype=base_NK.dtype)

        def packed(x: torch.Tensor = x_TK, y: torch.Tensor = y_TN) -> None:
            delta_matmul(y, x, operand)

        def dense(x: torch.Tensor = x_TK) -> None:
            F.linear(x, base_NK)

        found.append(_best(packed) - _best(dense))
    return tuple(found)


def _best(work: Callable[[], None]) -> float:
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)

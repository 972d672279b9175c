"""From how many rows of one delta on it is unpacked once, for the library's matmul.

The packed kernels read a delta once per chunk of rows; ``dense.py`` writes it out once and reads it
as the library does. Which is the faster depends on the device, and is measured when an engine
starts. One number serves all layers of a step, which share its chunks: that of the base's largest
projection and of 2 bits in groups, the compressor's plain format.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence

import torch

from deltaserve.kernels.delta_matmul.chunks import DENSE_ROWS, Segment, cut
from deltaserve.kernels.delta_matmul.dense import apply_dense
from deltaserve.kernels.delta_matmul.grouped import GroupedDeltas
from deltaserve.kernels.delta_matmul.synthetic import random_operand

logger = logging.getLogger(__name__)

CANDIDATES = (32, 64, 128, 256, 512)
"""Numbers of rows. Fewer are always packed: so are decode steps, for which the kernels are made."""
FORMAT = {"bits": 2, "group_size": 128}
REPEATS = 5

Timer = Callable[[Callable[[], object]], float]
"""What takes work and tells how long it takes, in any unit."""
Measured = Mapping[int, tuple[float, float]]
"""Rows -> (packed, dequantised)."""


def measure(grouped: GroupedDeltas, timer: Timer, candidates: Sequence[int]) -> Measured:
    """Both ways, for a layer whose one operand is in slot 1."""
    outputs, inputs = grouped.base_NK.shape
    (table,) = grouped.tables.values()
    operand, found = table.operands[1], {}
    for rows in candidates:
        x_TK = grouped.base_NK.new_zeros(rows, inputs)
        y_TN = grouped.base_NK.new_zeros(rows, outputs)
        chunks = cut([Segment(1, 0, rows)], x_TK.device, dense_rows=rows + 1)

        def packed(y: torch.Tensor = y_TN, x: torch.Tensor = x_TK, chunks: object = chunks) -> None:
            grouped.apply(y, x, chunks)  # type: ignore[arg-type]

        def dense(y: torch.Tensor = y_TN, x: torch.Tensor = x_TK) -> None:
            apply_dense(operand, y, x)

        found[rows] = timer(packed), timer(dense)
    return found


def first_win(measured: Measured) -> int | None:
    """The number of rows from which on dequantising was never the slower; None: it always was."""
    first = None
    for rows in sorted(measured, reverse=True):
        packed, dense = measured[rows]
        if dense > packed:
            break
        first = rows
    return first


@torch.inference_mode()
def dense_rows(base_NK: torch.Tensor) -> int:
    """On this weight's device; some milliseconds, once compiled. Where no kernels serve such
    weights it makes no difference.

    Raises torch.OutOfMemoryError: the weight once more, dense, must fit.
    """
    grouped = GroupedDeltas("the base's widest projection", base_NK, False)
    if not grouped.serves_layer():
        return DENSE_ROWS
    outputs, inputs = base_NK.shape
    operand = random_operand("int", FORMAT, outputs, inputs, base_NK.dtype, str(base_NK.device))
    grouped.attach(1, operand)
    measured = measure(grouped, _best_seconds, CANDIDATES)
    found = first_win(measured) or 2 * CANDIDATES[-1]
    logger.info(
        "delta matmul: from %d rows of one delta on it is dequantised; milliseconds packed and "
        "dequantised: %s",
        found,
        "; ".join(f"{n} rows {1e3 * a:.2f} {1e3 * b:.2f}" for n, (a, b) in measured.items()),
    )
    return found


def _best_seconds(work: Callable[[], object]) -> float:
    """By the clock, launches included: prompts are not captured."""
    times = []
    for _ in range(1 + REPEATS):  # the first compiles
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times[1:])

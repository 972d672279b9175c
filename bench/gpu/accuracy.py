"""The operators in bfloat16 against float64: ``python -m deltaserve.bench.gpu.accuracy``.

Every codec that has a kernel, at projection shapes of real models and at shapes that fill no block,
for one row, a few, and enough to be dequantised, beside other deltas in one step; and attention. An
error is the largest of the operator, relative to the largest value of the exact result. What
rounding the exact result once would give stands beside it: nothing can be better. Exits with 1 if
an error is over the limit.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
import torch.nn.functional as F

from deltaserve.artifact.codecs import get_codec
from deltaserve.artifact.codecs.base import Encoded
from deltaserve.bench.gpu.part import DEVICE, Part, device_name
from deltaserve.kernels.attention import PagedBatch, launch, reference
from deltaserve.kernels.delta_matmul import GroupedDeltas, Segment, cut
from deltaserve.kernels.delta_matmul.synthetic import random_operand

CASES: list[tuple[str, dict[str, Any]]] = [
    *(
        ("int", {"bits": bits, **scales, "planes": planes})
        for bits in (1, 2, 4)
        for scales in (
            {"group_size": 64},
            {"group_size": 128},
            {"scale_axis": "row"},
            {"scale_axis": "tensor"},
        )
        for planes in (1, 2)
    ),
    *(("nm24", {"bits": bits, "group_size": size}) for bits in (2, 4) for size in (64, 128, 0)),
    *(("lowrank", {"rank": rank}) for rank in (4, 16, 100, 512)),
]
SHAPES = [(4096, 4096), (1000, 14336), (6144, 2050)]
ROWS = (1, 4, 33, 200)
ATTENTION = [((32, 8), 128), ((8, 4), 256), ((14, 2), 64)]
LIMIT = 2**-7
"""Two roundings to bfloat16, of the base's output and of the sum, and what float32 sums lose."""


def matmuls(part: Part, outputs: int, inputs: int, rows_of: tuple[int, ...]) -> None:
    """All cases as deltas of one layer, in one step for each number of rows."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    cases = CASES[::6] if part.smoke else CASES
    base = torch.randn(outputs, inputs, dtype=dtype, device=DEVICE)
    grouped = GroupedDeltas("accuracy", base, False)
    operands = [random_operand(*case, outputs, inputs, dtype, DEVICE) for case in cases]
    for slot, operand in enumerate(operands, start=1):
        assert grouped.attach(slot, operand), cases[slot - 1]
    worst = dict.fromkeys(range(len(cases)), (0.0, 0.0))
    for rows in rows_of:
        segments = [Segment(i + 1, i * rows, (i + 1) * rows) for i in range(len(cases))]
        x = torch.randn(rows * len(cases), inputs, dtype=dtype, device=DEVICE)
        y = torch.randn(rows * len(cases), outputs, dtype=dtype, device=DEVICE)
        before = y.clone()
        grouped.apply(y, x, cut(segments, DEVICE))
        for i, (segment, operand) in enumerate(zip(segments, operands, strict=True)):
            own = slice(segment.start, segment.end)
            exact = before[own].double() + F.linear(x[own].double(), difference(operand))
            found = error(y[own], exact), error(exact.to(dtype), exact)
            worst[i] = max(worst[i], found)
    for i, (codec, params) in enumerate(cases):
        label = f"{codec} {params}"
        report(part, {"operator": label, "shape": [outputs, inputs]}, *worst[i])


def difference(operand: Encoded) -> torch.Tensor:
    delta: torch.Tensor = get_codec(operand.codec).delta(operand)  # type: ignore[attr-defined]
    return delta.double()


def attention(part: Part, heads: tuple[int, int], dim: int, window: int | None) -> None:
    """Prefill chunks and decode rows of one to several spans."""
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    new, lens = [1, 1, 100, 1, 7, 1], [1, 1500, 100, 513, 700, 40]
    if part.smoke:
        new, lens = [1, 3], [20, 9]
    num_heads, num_kv_heads = heads
    blocks = [-(-length // 16) for length in lens]
    order = torch.randperm(sum(blocks), device=DEVICE)
    table = torch.zeros(len(lens), max(blocks), dtype=torch.long, device=DEVICE)
    used = 0
    for row, count in enumerate(blocks):
        table[row, :count] = order[used : used + count]
        used += count
    starts = [sum(new[:row]) for row in range(len(new) + 1)]
    nothing = torch.empty(0, dtype=torch.long, device=DEVICE)  # keys and values are there
    batch = PagedBatch(nothing, table, lens, starts, 16)
    k, v = torch.randn(2, used * 16, num_kv_heads, dim, dtype=dtype, device=DEVICE)
    q = torch.randn(starts[-1], num_heads, dim, dtype=dtype, device=DEVICE)
    options: dict[str, Any] = {"scale": dim**-0.5, "window": window}
    out = launch.paged_attention(q, k, v, batch, **options)
    exact = reference.paged_attention(q.double(), k.double(), v.double(), batch, **options)
    label = f"attention, heads {num_heads}/{num_kv_heads} of {dim}, window {window}"
    found = {"operator": label, "shape": [starts[-1], num_heads, dim]}
    report(part, found, error(out, exact), error(exact.to(dtype), exact))


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


def report(part: Part, what: dict[str, Any], worst: float, rounding: float) -> None:
    right = worst < LIMIT
    part.add("rows", what | {"error": worst, "rounding": rounding, "right": right})
    mark = "" if right else "   WRONG"
    print(f"{what['operator']:<70}{what['shape']!s:<16}{worst:>10.1e}{rounding:>10.1e}{mark}")


@torch.inference_mode()
def main() -> None:
    part = Part.of_arguments("accuracy", __doc__)
    print(f"{device_name()}: largest error, and that of one rounding; limit {LIMIT:.1e}")
    torch.manual_seed(0)
    shapes = [(40, 70)] if part.smoke else SHAPES
    for outputs, inputs in shapes:
        if part.has_time(f"shape {outputs} x {inputs}", 3):
            matmuls(part, outputs, inputs, (1, 5) if part.smoke else ROWS)
    for heads, dim in [((4, 2), 16)] if part.smoke else ATTENTION:
        for window in (None, 300):
            attention(part, heads, dim, window)
    wrong = [row for row in part.results["rows"] if not row["right"]]
    part.note("wrong", len(wrong))
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()

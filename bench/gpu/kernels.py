"""The grouped delta matmul against the bytes it reads: ``python -m deltaserve.bench.gpu.kernels``.

For the projection shapes of Llama 3.1 8B, each format, rows per tenant and number of tenants:
the time of one launch sequence, the bytes that it must move, and the share that this is of the
bandwidth of a plain copy measured in the same run. Beside it a dense bfloat16 matmul per tenant
(a full fine-tune in memory) and dequantise-then-matmul per tenant. Times are medians of replayed
CUDA graphs, so that no launch cost counts, with the cache flushed before each. Then, by rows of one
tenant, from where on dequantise-then-matmul is the faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F

from deltaserve.bench.gpu.part import DEVICE, Clock, Part, copy_bandwidth, device_name
from deltaserve.kernels.delta_matmul import GroupedDeltas, Segment, crossover, cut
from deltaserve.kernels.delta_matmul.dense import apply_dense
from deltaserve.kernels.delta_matmul.synthetic import random_operand

# (outputs, inputs); q, k, v and gate, up as if they were one projection.
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
SMOKE_SHAPES = {"qkv": (70, 130)}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int 1 bit, row": ("int", {"bits": 1, "scale_axis": "row"}),
    "int 2 bit, group 128": ("int", {"bits": 2, "group_size": 128}),
    "int 4 bit, group 128": ("int", {"bits": 4, "group_size": 128}),
    "2:4 4 bit, group 128": ("nm24", {"bits": 4, "group_size": 128}),
    "LoRA 16": ("lowrank", {"rank": 16}),
}
ROWS = (1, 4, 16)
TENANTS = (1, 8, 32)
# Left out first when time is short.
LEAST = ("down", "qkv")
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32


def measure(part: Part, clock: Clock, bandwidth: float) -> None:
    shapes = SMOKE_SHAPES if part.smoke else SHAPES
    tenants = (1, 2) if part.smoke else TENANTS
    for shape in sorted(shapes, key=LEAST.__contains__):
        outputs, inputs = shapes[shape]
        dense = torch.randn(max(tenants), outputs, inputs, dtype=DTYPE, device=DEVICE)
        for label, (codec, params) in FORMATS.items():
            if not part.has_time(f"{shape}, {label}", 3):
                continue
            grouped = filled(shape, dense[0], codec, params, max(tenants))
            for count in tenants:
                for rows in ROWS[:2] if part.smoke else ROWS:
                    result = measure_one(clock, grouped, dense, count, rows)
                    share = result["bytes"] / (result["grouped_us"] * 1e-6) / bandwidth
                    row = {"shape": shape, "format": label} | result | {"of_copy": share}
                    part.add("rows", row)
                    print(line(row), flush=True)


def filled(
    name: str, base_NK: torch.Tensor, codec: str, params: dict[str, Any], slots: int
) -> GroupedDeltas:
    """Random operands of one format in the first slots."""
    grouped, (outputs, inputs) = GroupedDeltas(name, base_NK, False), base_NK.shape
    for slot in range(1, slots + 1):
        operand = random_operand(codec, params, outputs, inputs, base_NK.dtype, DEVICE)
        assert grouped.attach(slot, operand)
    return grouped


def measure_one(
    clock: Clock, grouped: GroupedDeltas, dense_SNK: torch.Tensor, tenants: int, rows: int
) -> dict[str, Any]:
    _, outputs, inputs = dense_SNK.shape
    x = torch.randn(tenants * rows, inputs, dtype=DTYPE, device=DEVICE)
    y = torch.randn(tenants * rows, outputs, dtype=DTYPE, device=DEVICE)
    segments = [Segment(i + 1, i * rows, (i + 1) * rows) for i in range(tenants)]
    chunks = cut(segments, DEVICE)
    (table,) = grouped.tables.values()
    operands = [table.operands[segment.slot] for segment in segments]
    stored = sum(part.nbytes for operand in operands for part in operand.parts)

    def each(apply: Callable[[int, torch.Tensor, torch.Tensor], object]) -> Callable[[], None]:
        def work() -> None:
            for i, s in enumerate(segments):
                apply(i, y[s.start : s.end], x[s.start : s.end])

        return work

    return {
        "tenants": tenants,
        "rows": rows,
        "bytes": stored + x.nbytes + 2 * y.nbytes,
        "grouped_us": clock.microseconds(lambda: grouped.apply(y, x, chunks)),
        "dense_us": clock.microseconds(each(lambda i, _, x: F.linear(x, dense_SNK[i]))),
        "dequantise_us": clock.microseconds(each(lambda i, y, x: apply_dense(operands[i], y, x))),
    }


def crossovers(part: Part, clock: Clock) -> Iterator[dict[str, Any]]:
    """By format and shape: rows of one tenant -> (packed, dequantised) microseconds."""
    shapes = SMOKE_SHAPES if part.smoke else {name: SHAPES[name] for name in ("qkv", "gate_up")}
    candidates = (8, 16) if part.smoke else crossover.CANDIDATES
    for label, (codec, params) in FORMATS.items():
        for shape, (outputs, inputs) in shapes.items():
            if not part.has_time(f"crossover of {label}, {shape}", 2):
                continue
            base = torch.empty(outputs, inputs, dtype=DTYPE, device=DEVICE)
            grouped = filled(shape, base, codec, params, 1)
            found = crossover.measure(grouped, clock.microseconds, candidates)
            yield {
                "format": label,
                "shape": shape,
                "microseconds": found,
                "dense_from": crossover.first_win(found),
            }


def line(result: dict[str, Any]) -> str:
    return (
        f"{result['shape']:<9}{result['format']:<22}{result['tenants']:>8}{result['rows']:>6}"
        f"{result['bytes'] / 1e6:>10.2f}{result['grouped_us']:>10.1f}{result['of_copy']:>9.0%}"
        f"{result['dense_us']:>10.1f}{result['dequantise_us']:>12.1f}"
    )


@torch.inference_mode()
def main() -> None:
    part = Part.of_arguments("kernels", __doc__)
    clock = Clock()
    bandwidth = copy_bandwidth(clock)
    part.note("copy_bytes_per_second", bandwidth)
    print(f"{device_name()}: a copy moves {bandwidth / 1e9:.0f} GB/s")
    # First, as it is short.
    for found in crossovers(part, clock):
        part.add("crossover", found)
        print(f"{found['shape']:<9}{found['format']:<22} dense from {found['dense_from']} rows")
    print(
        f"{'shape':<9}{'format':<22}{'tenants':>8}{'rows':>6}{'MB':>10}{'grouped':>10}"
        f"{'of copy':>9}{'dense':>10}{'dequantise':>12}   (microseconds)"
    )
    measure(part, clock, bandwidth)


if __name__ == "__main__":
    main()

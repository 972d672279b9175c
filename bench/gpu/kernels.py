"""The grouped delta matmul against the bytes it reads: ``python -m deltaserve.bench.gpu.kernels``.

For the projection shapes of Llama 3.1 8B, each format, rows per tenant and number of tenants:
the time of one launch sequence, the bytes that it must move, and the share that this is of the
bandwidth of a plain copy measured in the same run. Beside it a dense bfloat16 matmul per tenant
(a full fine-tune in memory) and dequantise-then-matmul per tenant. Times are medians of replayed
CUDA graphs, so that no launch cost counts, with the cache flushed before each.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from deltaserve.bench.record import record
from deltaserve.kernels.delta_matmul import GroupedDeltas, Segment, cut
from deltaserve.kernels.delta_matmul.dense import apply_dense
from deltaserve.kernels.delta_matmul.synthetic import random_operand

# (outputs, inputs); q, k, v and gate, up as if they were one projection.
SHAPES = {
    "qkv": (6144, 4096),
    "o": (4096, 4096),
    "gate_up": (28672, 4096),
    "down": (4096, 14336),
}
FORMATS: dict[str, tuple[str, dict[str, Any]]] = {
    "int 1 bit, row": ("int", {"bits": 1, "scale_axis": "row"}),
    "int 2 bit, group 128": ("int", {"bits": 2, "group_size": 128}),
    "int 4 bit, group 128": ("int", {"bits": 4, "group_size": 128}),
    "2:4 4 bit, group 128": ("nm24", {"bits": 4, "group_size": 128}),
    "LoRA 16": ("lowrank", {"rank": 16}),
}
ROWS = (1, 4, 16)
TENANTS = (1, 8, 32)
DTYPE = torch.bfloat16
REPEATS = 15
# Several times the cache of an H200.
FLUSH_BYTES = 256 << 20
COPY_BYTES = 1 << 30


class Clock:
    """Times work on the device, in microseconds."""

    def __init__(self) -> None:
        self.flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")

    def microseconds(self, work: Callable[[], object]) -> float:
        """Median over replays of the work as a graph, each after a flush of the cache."""
        work()  # compiles
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        times = []
        for _ in range(REPEATS):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            # It also keeps the device busy until the graph has been handed over.
            self.flush.zero_()
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e3)
        return statistics.median(times)


def copy_bandwidth(clock: Clock) -> float:
    """Bytes per second, read and written, of the largest plain copy."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / clock.microseconds(lambda: target.copy_(source)) * 1e6


def measure(clock: Clock, bandwidth: float) -> list[dict[str, Any]]:
    found = []
    for shape, (outputs, inputs) in SHAPES.items():
        dense = torch.randn(max(TENANTS), outputs, inputs, dtype=DTYPE, device="cuda")
        for label, (codec, params) in FORMATS.items():
            grouped = GroupedDeltas(shape, dense[0], False)
            for slot in range(1, max(TENANTS) + 1):
                enc = random_operand(codec, params, outputs, inputs, DTYPE, "cuda")
                assert grouped.attach(slot, enc)
            for tenants in TENANTS:
                for rows in ROWS:
                    result = measure_one(clock, grouped, dense, tenants, rows)
                    share = result["bytes"] / (result["grouped_us"] * 1e-6) / bandwidth
                    found.append({"shape": shape, "format": label} | result | {"of_copy": share})
                    print(line(found[-1]), flush=True)
    return found


def measure_one(
    clock: Clock, grouped: GroupedDeltas, dense_SNK: torch.Tensor, tenants: int, rows: int
) -> dict[str, Any]:
    _, outputs, inputs = dense_SNK.shape
    x = torch.randn(tenants * rows, inputs, dtype=DTYPE, device="cuda")
    y = torch.randn(tenants * rows, outputs, dtype=DTYPE, device="cuda")
    segments = [Segment(i + 1, i * rows, (i + 1) * rows) for i in range(tenants)]
    chunks = cut(segments, "cuda")
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


def line(result: dict[str, Any]) -> str:
    return (
        f"{result['shape']:<9}{result['format']:<22}{result['tenants']:>8}{result['rows']:>6}"
        f"{result['bytes'] / 1e6:>10.2f}{result['grouped_us']:>10.1f}{result['of_copy']:>9.0%}"
        f"{result['dense_us']:>10.1f}{result['dequantise_us']:>12.1f}"
    )


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    clock = Clock()
    bandwidth = copy_bandwidth(clock)
    print(f"{torch.cuda.get_device_name()}: a copy moves {bandwidth / 1e9:.0f} GB/s")
    print(
        f"{'shape':<9}{'format':<22}{'tenants':>8}{'rows':>6}{'MB':>10}{'grouped':>10}"
        f"{'of copy':>9}{'dense':>10}{'dequantise':>12}   (microseconds)"
    )
    results = {"copy_bytes_per_second": bandwidth, "rows": measure(clock, bandwidth)}
    if args.out:
        record(args.out, "python -m deltaserve.bench.gpu.kernels", results)


if __name__ == "__main__":
    main()

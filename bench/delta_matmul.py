"""What a delta costs on top of the base's projection: ``python -m deltaserve.bench.delta_matmul``.

For each codec and number of rows, in one run: the dense projection alone (which is also what a
merged weight costs, in the memory of a whole model per fine-tune), the reference operator, and
the operand as the engine serves it on this device. Times are medians; ratios compare within the
run.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from deltaserve.artifact.codecs import get_codec
from deltaserve.bench.record import record
from deltaserve.engine.pieces import Piece, Pieces, join
from deltaserve.kernels.delta_matmul import delta_matmul, reference

CODECS: dict[str, tuple[str, dict[str, Any]]] = {
    "int 1 bit, row": ("int", {"bits": 1, "scale_axis": "row"}),
    "int 2 bit, group 64": ("int", {"bits": 2}),
    "int 4 bit, group 64": ("int", {"bits": 4}),
    "nm24 4 bit": ("nm24", {"bits": 4}),
    "lowrank 16": ("lowrank", {"rank": 16}),
    "nf4": ("nf4", {}),
}
ROWS = (1, 4, 16, 64)


def milliseconds(work: Callable[[], object], repeats: int) -> float:
    """Median over ``repeats`` calls after one that warms up."""
    work()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


@torch.inference_mode()
def measure(size: int, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    torch.manual_seed(0)
    base = torch.randn(size, size, dtype=dtype)
    tuned = base + 0.05 * torch.randn(size, size, dtype=dtype)
    results = []
    for label, (name, params) in CODECS.items():
        enc = get_codec(name).encode(tuned, base, **params)
        served = join((Piece(0, enc),), dtype)
        served_bytes = sum(piece.enc.num_bytes for piece in served)

        def serve(y: torch.Tensor, x: torch.Tensor, served: Pieces = served) -> None:
            for piece in served:
                delta_matmul(y, x, piece.enc)

        for rows in ROWS:
            x = torch.randn(rows, size, dtype=dtype)
            y = F.linear(x, base)
            results.append(
                {
                    "codec": label,
                    "bits_per_weight": round(enc.num_bytes * 8 / base.numel(), 3),
                    "served_bits": round(served_bytes * 8 / base.numel(), 3),
                    "rows": rows,
                    "base_ms": milliseconds(lambda: F.linear(x, base), repeats),  # noqa: B023
                    "reference_ms": milliseconds(
                        lambda: reference.delta_matmul(y, x, enc),  # noqa: B023
                        repeats,
                    ),
                    "served_ms": milliseconds(lambda: serve(y, x), repeats),  # noqa: B023
                }
            )
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=2048, help="inputs and outputs (default 2048)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    results = measure(args.size, getattr(torch, args.dtype), args.repeats)
    print(
        f"{'codec':<22}{'bits':>6}{'served':>8}{'rows':>6}"
        f"{'base ms':>9}{'reference':>11}{'served':>9}"
    )
    for r in results:
        print(
            f"{r['codec']:<22}{r['bits_per_weight']:>6.2f}{r['served_bits']:>8.2f}{r['rows']:>6}"
            f"{r['base_ms']:>9.2f}{r['reference_ms']:>11.2f}{r['served_ms']:>9.2f}"
        )
    if args.out:
        command = (
            f"python -m deltaserve.bench.delta_matmul --size {args.size} --dtype {args.dtype} "
            f"--repeats {args.repeats}"
        )
        record(args.out, command, results)


if __name__ == "__main__":
    main()

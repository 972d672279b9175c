"""The neighbour graph: time, memory and recall, against all pairs on a sample of rows.

Clustered synthetic vectors: one Gaussian for every 100 rows, of a spread of 0.5 around centres of
spread 1 (at 1, and a million rows, clusters drown in each other and no inverted file helps). The
out-of-core build must find exactly what the one in memory finds.

    python -m deltaserve.bench.select_neighbours --out bench/results/select_neighbours.json
"""

from __future__ import annotations

import argparse
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.bench.record import record
from deltaserve.select.neighbours import KnnOptions, find_neighbours

SIZES = ("1000000x64", "200000x384")
BLOCK = 100_000
PER_CLUSTER = 100


def vectors(path: Path, count: int, dims: int, noise: float, seed: int = 0) -> np.ndarray:
    """float32 [count, dims] in a file, written block by block."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(max(1, count // PER_CLUSTER), dims)).astype(np.float32)
    found = np.lib.format.open_memmap(path, mode="w+", dtype=np.float32, shape=(count, dims))
    for start in range(0, count, BLOCK):
        rows = found[start : start + BLOCK]
        which = rng.integers(0, len(centres), len(rows))
        rows[:] = centres[which] + noise * rng.normal(size=rows.shape).astype(np.float32)
    found.flush()
    return found


def measure(count: int, dims: int, noise: float, options: KnnOptions) -> tuple[dict[str, Any], Any]:
    with tempfile.TemporaryDirectory() as folder:
        x = vectors(Path(folder) / "x.npy", count, dims, noise)
        wall, cpu = time.perf_counter(), time.process_time()
        found = find_neighbours(x, options)
        row = {
            "rows": count,
            "dimensions": dims,
            "noise": noise,
            "neighbours": options.neighbours,
            "index": found.index,
            "recall": found.recall,
            "seconds": time.perf_counter() - wall,
            "cpu_seconds": time.process_time() - cpu,
            # Of the process so far: later rows cannot show less than earlier ones.
            "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        }
    return row, found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=SIZES, metavar="ROWSxDIMENSIONS")
    parser.add_argument("--probes", type=int, help="default: what a recall of 0.95 takes")
    parser.add_argument("--noise", type=float, default=0.5, help="spread of a cluster")
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    results = []
    for size in args.sizes:
        count, dims = map(int, size.split("x"))
        results.append(
            measure(count, dims, args.noise, KnnOptions(index="ivf", probes=args.probes))[0]
        )
        print(results[-1])
    count, dims = map(int, args.sizes[-1].split("x"))
    small = min(count, 50_000)
    inside = measure(small, dims, args.noise, KnnOptions(index="ivf", probes=args.probes))
    limit = 4 * small * dims // 8
    outside = measure(
        small, dims, args.noise, KnnOptions(index="ivf", probes=args.probes, memory_bytes=limit)
    )
    same = bool(
        np.array_equal(inside[1].ids, outside[1].ids)
        and np.array_equal(inside[1].similarities, outside[1].similarities)
    )
    results += [inside[0], {**outside[0], "equals_in_memory": same}]
    print(results[-1])
    if args.out:
        command = f"python -m deltaserve.bench.select_neighbours --sizes {' '.join(args.sizes)}" + (
            f" --probes {args.probes}" if args.probes else ""
        )
        record(args.out, command, results)


if __name__ == "__main__":
    main()

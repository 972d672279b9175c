"""Data selection against its figures: ``python -m deltaserve.bench.select PART ...``.

    exactness   brute force on fresh instances; greedy, its heap and its parallel form agree
    quality     approximations beside centralised greedy, on a pool of 50,000 points
    scale       10 million points: time and memory, in memory and from disk
    peers       apricot and submodlib beside ours, the same objective, in one run

Every figure is shown beside what is asked of it. Other ``--seed``s make other pools.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable
from pathlib import Path

from deltaserve.bench.record import record
from deltaserve.bench.select_check import Report, show
from deltaserve.bench.select_exactness import exactness
from deltaserve.bench.select_peers import peers
from deltaserve.bench.select_quality import quality
from deltaserve.bench.select_scale import scale


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=("exactness", "quality", "scale", "peers"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--points", type=int, default=10_000_000, help="of the part scale")
    parser.add_argument("--dir", type=Path, help="for the graph of scale (default: temporary)")
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    parts: dict[str, Callable[[Report, int], None]] = {
        "exactness": exactness,
        "quality": quality,
        "scale": functools.partial(scale, points=args.points, directory=args.dir),
        "peers": peers,
    }
    report = Report()
    for part in args.parts:
        parts[part](report, args.seed)
    show(report.checks)
    if args.out:
        command = f"python -m deltaserve.bench.select {' '.join(args.parts)} --seed {args.seed}"
        if "scale" in args.parts:
            command += f" --points {args.points}"
        record(args.out, command, report.rows())
    if any(check.passed is False for check in report.checks):
        sys.exit(1)


if __name__ == "__main__":
    main()

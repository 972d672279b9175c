"""Input pipelines against their figures: ``python -m deltaserve.bench.pipeline PART ...``.

    names    planted bottlenecks, also one that a wall clock gets wrong
    cost     what recording adds
    tuning   tuned settings beside a grid search, from three bad starts, on six pipelines
    drift    the controller: tokenising costs twice as much, then half the demand

Every figure is shown beside what is asked of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

from deltaserve.bench.pipeline_drift import drift
from deltaserve.bench.pipeline_planted import naming, overhead
from deltaserve.bench.pipeline_tuning import tuning
from deltaserve.bench.record import record
from deltaserve.bench.select_check import Report, show

PARTS: dict[str, Callable[[Report, int], None]] = {
    "names": naming,
    "cost": overhead,
    "tuning": tuning,
    "drift": drift,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    report = Report()
    for part in args.parts:
        PARTS[part](report, args.seed)
    show(report.checks)
    if args.out:
        command = f"python -m deltaserve.bench.pipeline {' '.join(args.parts)} --seed {args.seed}"
        record(args.out, command, report.rows())
    if any(check.passed is False for check in report.checks):
        sys.exit(1)


if __name__ == "__main__":
    main()

"""Input pipelines against their figures: ``python -m deltaserve.bench.pipeline PART ...``.

    names    planted bottlenecks, also one that a wall clock gets wrong
    cost     what recording adds
    tuning   tuned settings beside a grid search, from three bad starts, on six pipelines
    drift    the controller: tokenising costs twice as much, then half the demand
    disk     lines from a disk of 50 to 300 MB/s: the promised rate beside the measured one
    resume   200 cuts at random elements of six pipelines, restored with other workers

Every figure is shown beside what is asked of it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from deltaserve.bench.pipeline_cases import CASES, Case
from deltaserve.bench.pipeline_disk import disk
from deltaserve.bench.pipeline_drift import drift
from deltaserve.bench.pipeline_planted import naming, overhead
from deltaserve.bench.pipeline_resume import resume
from deltaserve.bench.pipeline_tuning import tuning
from deltaserve.bench.record import record
from deltaserve.bench.select_check import Report, show

PARTS: dict[str, Callable[[Report, int, Sequence[Case]], None]] = {
    "names": lambda report, seed, cases: naming(report, seed),
    "cost": lambda report, seed, cases: overhead(report, seed),
    "tuning": tuning,
    "drift": lambda report, seed, cases: drift(report, seed),
    "disk": lambda report, seed, cases: disk(report, seed),
    "resume": resume,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("parts", nargs="+", choices=PARTS)
    parser.add_argument("--seed", type=int, default=0)
    names = [case.name for case in CASES]
    parser.add_argument(
        "--case", choices=names, action="append", help="of tuning and resume: only these"
    )
    parser.add_argument("--out", type=Path, help="write a JSON file as well")
    args = parser.parse_args()
    report = Report()
    cases = [case for case in CASES if case.name in (args.case or names)]
    for part in args.parts:
        PARTS[part](report, args.seed, cases)
    show(report.checks)
    if args.out:
        command = f"python -m deltaserve.bench.pipeline {' '.join(args.parts)} --seed {args.seed}"
        command += "".join(f" --case {name}" for name in args.case or ())
        record(args.out, command, report.rows())
    if any(check.passed is False for check in report.checks):
        sys.exit(1)


if __name__ == "__main__":
    main()

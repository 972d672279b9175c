"""Tuned settings against a grid search, from three bad starts, on the six cases.

The grid's winner and the tuned settings are measured again turn by turn, so that neither wins
by luck or by a quiet moment of the machine.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deltaserve.bench.pipeline_cases import Case, Data, cases
from deltaserve.bench.pipeline_stages import Staged
from deltaserve.bench.select_check import Report
from deltaserve.pipeline.consumption import usable_cores
from deltaserve.pipeline.tracing import Recorder
from deltaserve.pipeline.tuning.program import Resources
from deltaserve.pipeline.tuning.tune import tune

GRID = (1, 2, 4, 8, 16)
MOST = 16
LEAST_SHARE = 0.95


def rate(case: Case, threads: Mapping[str, int], seconds: float) -> float:
    """Elements a second after a quarter of the time, not recorded."""
    pipeline = Staged(case.source, case.steps, threads)
    try:
        warm = time.perf_counter() + seconds / 4
        while time.perf_counter() < warm:
            next(pipeline)
        start, taken = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            next(pipeline)
            taken += 1
        return taken / (time.perf_counter() - start)
    finally:
        pipeline.close()


def side_by_side(
    case: Case, settings: Sequence[Mapping[str, int]], seconds: float, rounds: int
) -> list[float]:
    """Median rate of each setting, measured in turns."""
    found: list[list[float]] = [[] for _ in settings]
    for _ in range(rounds):
        for rates, threads in zip(found, settings, strict=True):
            rates.append(rate(case, threads, seconds))
    return [statistics.median(rates) for rates in found]


def starts(names: Sequence[str], good: Mapping[str, int]) -> dict[str, dict[str, int]]:
    """All 1, all at most, and the good settings turned around: most where least is needed."""
    ranked = sorted(good.values())
    turned = dict(zip(sorted(names, key=lambda n: -good[n]), ranked, strict=True))
    return {"all 1": dict.fromkeys(names, 1), "all 16": dict.fromkeys(names, MOST)} | {
        "inverted": turned
    }


def best_of_grid(case: Case, seconds: float, grid: Sequence[int] = GRID) -> dict[str, int]:
    names = case.parallel()
    every = [
        dict(zip(names, values, strict=True))
        for values in itertools.product(grid, repeat=len(names))
    ]
    return max(every, key=lambda threads: rate(case, threads, seconds))


def tuned(case: Case, start: Mapping[str, int], seconds: float) -> dict[str, int]:
    found = tune(
        lambda threads: Staged(case.source, case.steps, threads, Recorder()),
        start,
        Resources(cores=usable_cores(), max_threads=MOST),
        seconds=seconds,
    )
    return dict(found.threads)


def tuning(report: Report, seed: int, seconds: float = 0.5) -> None:
    with tempfile.TemporaryDirectory() as folder:
        data = Data(Path(folder), seed)
        shares = []
        for case in cases(data):
            shares += _compare(report, case, seconds)
    report.at_least("tuning", "median share of the grid's best", statistics.median(shares), 0.97)


def _compare(report: Report, case: Case, seconds: float) -> list[float]:
    best = best_of_grid(case, seconds / 2)
    found = {
        name: tuned(case, start, 2 * seconds)
        for name, start in starts(case.parallel(), best).items()
    }
    rule = dict.fromkeys(case.parallel(), usable_cores())
    settings = [best, rule, *found.values()]
    rates = side_by_side(case, settings, seconds, 5)
    report.fact("tuning", f"{case.name}: grid's best {_shown(best)}, elements/s", rates[0])
    report.fact("tuning", f"{case.name}: threads = cores, share of the best", rates[1] / rates[0])
    shares = [each / rates[0] for each in rates[2:]]
    for (name, threads), share in zip(found.items(), shares, strict=True):
        label = f"{case.name}: from {name}, {_shown(threads)}, share of the best"
        report.at_least("tuning", label, share, LEAST_SHARE)
    return shares


def _shown(threads: Mapping[str, int]) -> str:
    return " ".join(f"{name}={n}" for name, n in threads.items())

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
from typing import Any

from deltaserve.bench.pipeline_cases import Case
from deltaserve.bench.pipeline_text import Corpus, write
from deltaserve.bench.select_check import Report
from deltaserve.pipeline.consumption import usable_cores
from deltaserve.pipeline.iterator import prepare
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.profiling import Profiled, segment_names
from deltaserve.pipeline.tuning.plans import Workload
from deltaserve.pipeline.tuning.settings import Settings
from deltaserve.pipeline.tuning.tune import tune

GRID = (1, 2, 4, 8, 16)
MOST = 16
LEAST_SHARE = 0.95
ROUNDS = 5


def rate(plan: Plan, settings: Settings, seconds: float) -> float:
    """Elements a second after the first eight, not recorded."""
    running = Profiled(plan, settings, record=False)
    try:
        for _ in range(8):
            next(running)
        start, taken = time.perf_counter(), 0
        while time.perf_counter() < start + seconds:
            next(running)
            taken += 1
        return taken / (time.perf_counter() - start)
    finally:
        running.close()


def side_by_side(
    plan: Plan, settings: Sequence[Settings], seconds: float, rounds: int = ROUNDS
) -> list[float]:
    """Median rate of each setting, measured in turns; the same setting is measured once."""
    found: dict[str, list[float]] = {str(each): [] for each in settings}
    for _ in range(rounds):
        for each in {str(each): each for each in settings}.values():
            found[str(each)].append(rate(plan, each, seconds))
    return [statistics.median(found[str(each)]) for each in settings]


def starts(stages: Sequence[str], best: Settings) -> dict[str, Settings]:
    """All 1, all at most, and the best turned around: most threads where fewest are needed, and
    one process where threads are best."""
    ranked = sorted(stages, key=lambda stage: best.workers(stage))
    turned = dict(zip(ranked, sorted(map(best.workers, stages), reverse=True), strict=True))
    alone = Settings(processes=1) if len(stages) == 1 and not best.processes else None
    return {
        "all 1": Settings(dict.fromkeys(stages, 1)),
        f"all {MOST}": Settings(dict.fromkeys(stages, MOST)),
        "inverted": alone or Settings(turned),
    }


def grid(stages: Sequence[str]) -> list[Settings]:
    threads = itertools.product(GRID, repeat=len(stages))
    found = [Settings(dict(zip(stages, each, strict=True))) for each in threads]
    return found + [Settings(processes=count) for count in range(1, usable_cores() + 1)]


def tuned(work: Workload, start: Settings, known: Mapping[str, Any], seconds: float) -> Settings:
    stages = segment_names(prepare(work.plan))
    found = tune(work.open, start, stages, seconds=seconds, **known)
    # Caches are not part of the grid: they pay from the second epoch on.
    return Settings(found.settings.threads, found.settings.processes, found.settings.prefetch)


def tuning(report: Report, seed: int, cases: Sequence[Case], seconds: float = 1.0) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = write(Path(folder), seed=seed)
        shares = [share for case in cases for share in compare(report, case, corpus, seconds)]
    report.at_least("tuning", "median share of the grid's best", statistics.median(shares), 0.97)


def compare(report: Report, case: Case, corpus: Corpus, seconds: float) -> list[float]:
    plan = case.make(corpus)
    work = Workload(plan, max_threads=MOST)
    stages = segment_names(prepare(plan))
    best = max(grid(stages), key=lambda each: rate(plan, each, seconds))
    known = work.knowledge() | {"natures": {}}
    found = {
        name: tuned(work, start, known, 2 * seconds) for name, start in starts(stages, best).items()
    }
    rule = Settings(dict.fromkeys(stages, usable_cores()))
    settings = [best, rule, *found.values()]
    rates = side_by_side(plan, settings, seconds)
    report.fact("tuning", f"{case.name}: grid's best, {best}: elements/s", rates[0])
    report.fact("tuning", f"{case.name}: threads = cores, share of the best", rates[1] / rates[0])
    shares = [each / rates[0] for each in rates[2:]]
    for (name, chosen), share in zip(found.items(), shares, strict=True):
        label = f"{case.name}: from {name}, {chosen}: share of the best"
        report.at_least("tuning", label, share, LEAST_SHARE)
    return shares

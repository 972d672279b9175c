"""Tuned settings against a grid search, from three bad starts, on the six cases.

The two best of the grid and the tuned settings are measured again turn by turn, and shares are
those of one turn, so that neither wins by luck or by a quiet moment of the machine.
"""

from __future__ import annotations

import itertools
import statistics
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from deltaserve.bench.pipeline_cases import Case
from deltaserve.bench.pipeline_text import Corpus, write
from deltaserve.bench.select_check import Report
from deltaserve.pipeline.consumption import usable_cores
from deltaserve.pipeline.iterator import prepare
from deltaserve.pipeline.profiling import segment_names
from deltaserve.pipeline.rewrites import READY
from deltaserve.pipeline.tuning.plans import Workload
from deltaserve.pipeline.tuning.settings import Settings
from deltaserve.pipeline.tuning.tune import Tuned, run_traced, tune

GRID, COARSE = (1, 2, 4, 8, 16), (1, 4, 16)
"""Threads of a plan's only stage, and of each of several."""
MOST = 16
LEAST_SHARE, LEAST_MEDIAN, LEAST_OF_RULE = 0.95, 0.97, 0.98
BOUND_BEFORE, BOUND_AFTER = 2.0, 1.3
"""How far the program's bound may lie above what is measured, where the cores or the lock limit."""
ROUNDS = 3


def side_by_side(
    work: Workload, settings: Sequence[Settings], seconds: float
) -> dict[str, list[float]]:
    """Rates of each setting, one of each turn; equal settings are measured once."""
    found: dict[str, list[float]] = {str(each): [] for each in settings}
    for _ in range(ROUNDS):
        for each in {str(each): each for each in settings}.values():
            found[str(each)].append(run_traced(work.open(each), seconds=seconds).rate)
    return found


def share(rates: Mapping[str, list[float]], one: Settings, other: Settings) -> float:
    """Median over turns of one's rate beside the other's."""
    pairs = zip(rates[str(one)], rates[str(other)], strict=True)
    return statistics.median(a / b for a, b in pairs)


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
    threads = itertools.product(GRID if len(stages) == 1 else COARSE, repeat=len(stages))
    found = [Settings(dict(zip(stages, each, strict=True))) for each in threads]
    return found + [Settings(processes=count) for count in range(1, usable_cores() + 1)]


def tuning(report: Report, seed: int, cases: Sequence[Case], seconds: float = 0.8) -> None:
    with tempfile.TemporaryDirectory() as folder:
        corpus = write(Path(folder), seed=seed)
        shares = [share for case in cases for share in compare(report, case, corpus, seconds)]
    median = statistics.median(shares)
    report.at_least("tuning", "median share of the grid's best", median, LEAST_MEDIAN)


def compare(report: Report, case: Case, corpus: Corpus, seconds: float) -> list[float]:
    work = Workload(case.make(corpus), max_threads=MOST)
    stages = segment_names(prepare(work.plan))
    ranked = sorted(
        grid(stages), key=lambda each: -run_traced(work.open(each), seconds=seconds).rate
    )
    # Caches are not part of the grid: they pay from the second epoch on.
    known: dict[str, Any] = work.knowledge() | {"natures": {}}
    found = {
        name: tune(work.open, start, stages, seconds=2 * seconds, **known)
        for name, start in starts(stages, ranked[0]).items()
    }
    rule = Settings(dict.fromkeys(stages, usable_cores()))
    found = {name: replace(each, settings=_plain(each.settings)) for name, each in found.items()}
    chosen = [each.settings for each in found.values()]
    rates = side_by_side(work, [*ranked[:2], rule, *chosen], seconds)
    best = max(ranked[:2], key=lambda each: statistics.median(rates[str(each)]))
    label = f"{case.name}: grid's best, {best}: elements/s"
    report.fact("tuning", label, statistics.median(rates[str(best)]))
    for name, each in found.items():
        where = f"{case.name} from {name}"
        label = f"{where}, {each.settings}: share of the best"
        report.at_least("tuning", label, share(rates, each.settings, best), LEAST_SHARE)
        label = f"{where}: share of threads = cores"
        report.at_least("tuning", label, share(rates, each.settings, rule), LEAST_OF_RULE)
        _bounds(report, where, each, statistics.median(rates[str(each.settings)]))
    return [share(rates, each, best) for each in chosen]


def _plain(settings: Settings) -> Settings:
    """As the grid writes it: the prefetch that every plan gets is not named."""
    return replace(settings, prefetch=None) if settings.prefetch == READY else settings


def _bounds(report: Report, where: str, found: Tuned, rate: float) -> None:
    """The program's bound beside the rate at the start and the tuned one."""
    bound, limits = found.advice.allocation.rate, found.advice.allocation.limits
    before, after = bound / found.traces[0].rate, bound / rate
    labels = [f"{where}: bound ({', '.join(limits)}) / rate {when}" for when in ("before", "after")]
    if set(limits) & {"cores", "gil"}:
        report.at_most("tuning", labels[0], before, BOUND_BEFORE)
        report.within("tuning", labels[1], after, 1.0, BOUND_AFTER)
    else:
        report.fact("tuning", labels[0], before)
        report.at_least("tuning", labels[1], after, 1.0)

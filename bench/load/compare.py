"""Is B faster than A, or is it noise? Ratios with bootstrap confidence intervals.

Neighbouring requests share a queue, so single requests cannot be drawn as if they were
independent: blocks of consecutive ones are (circular block bootstrap, Politis and Romano 1992),
long enough for what their autocorrelation shows, and the interval is widened as Student's for
the few blocks that there are. Where several runs of a side are given, runs are drawn first, so
that what differs from run to run counts too; of one run each, it cannot be seen. Of 100 pairs of
equal servers behind a half-loaded queue (400 requests each, made up), 6 were told apart by their
mean TTFT and 7 by its p99; 5 are meant. Of 40 that were a fifth slower, all were by TPOT, 31 by
mean E2E.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np

from deltaserve.bench.load.result import read_result
from deltaserve.bench.load.runner import COMPLETE
from deltaserve.errors import ConfigError

REPLICATES = 1000
CONFIDENCE = 0.95
FEWEST = 20
"""Values of which an interval can be made."""
LEAST = 0.01
"""Of a ratio: two runs of one server differ by as much, however narrow the intervals are."""
WINDOWS = 50

Values = list[np.ndarray]
"""One array for each run, in the order in which the requests were scheduled."""
Statistic = Callable[[np.ndarray], float]

STATISTICS: dict[str, Statistic] = {
    "mean": lambda values: float(values.mean()),
    "p50": lambda values: float(np.percentile(values, 50)),
    "p99": lambda values: float(np.percentile(values, 99)),
}


@dataclass(frozen=True)
class Row:
    """B over A; low and high: of the confidence interval of the ratio, None of too few values."""

    metric: str
    a: float
    b: float
    low: float | None
    high: float | None
    more_is_better: bool = False

    @property
    def ratio(self) -> float:
        return self.b / self.a

    @property
    def verdict(self) -> str:
        if self.low is None or self.high is None:
            return "too few values"
        if self.low <= 1 <= self.high or abs(self.ratio - 1) < LEAST:
            return "noise"
        return "better" if (self.ratio > 1) == self.more_is_better else "worse"


def compare(a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Every number that both sides have. Repeatable: the resampling is seeded."""
    rows = []
    for name in ("ttft", "tpot", "e2e", "max_gap"):
        sides = [[_latencies(result, name) for result in side] for side in (a, b)]
        for which, statistic in STATISTICS.items():
            rows += _row(f"{name} {which}", sides[0], sides[1], statistic)
    for name in ("output_tokens", "requests"):
        sides = [[_rates(result, name) for result in side] for side in (a, b)]
        rows += _row(f"{name}/s", sides[0], sides[1], STATISTICS["mean"], more_is_better=True)
    return rows


def read_side(path: Path) -> list[dict[str, Any]]:
    """The result of a file, or all of a folder. Raises ConfigError: none, or not one."""
    if not path.is_dir():
        return [read_result(path)]
    results = [read_result(each) for each in sorted(path.glob("*.json"))]
    if not results:
        raise ConfigError(f"{path}: holds no results (*.json)")
    return results


def render(
    a: Sequence[Mapping[str, Any]], b: Sequence[Mapping[str, Any]], rows: Sequence[Row]
) -> Iterator[str]:
    """Lines of text. Times are milliseconds."""
    for label, side in (("A", a), ("B", b)):
        failed = sum(result["summary"]["failed"] for result in side)
        count = sum(result["summary"]["requests"] for result in side)
        yield f"{label}: {side[0]['name']}, {len(side)} run(s), {failed} of {count} requests failed"
    if len({result["workload_digest"] for result in (*a, *b)}) > 1:
        yield "NOTE: the workloads differ; the ratios compare more than the servers."
    if cut := [result for result in (*a, *b) if result["ended"] != COMPLETE]:
        yield f"NOTE: {len(cut)} run(s) ended early: {cut[0]['ended']}; slow answers are missing."
    if any(bad(result.get("client", {})) for result in (*a, *b)):
        yield "NOTE: a client was slow or stood still; its own times are in the ratios."
    if not rows:
        yield "Nothing to compare: no number was measured on both sides."
        return
    if len(a) == len(b) == 1:
        yield "NOTE: one run each; what differs from run to run is not in the intervals."
    yield f"{'':<16}{'A':>12}{'B':>12}{'B/A':>8}  {CONFIDENCE:.0%} interval"
    for row in rows:
        scale = 1.0 if row.more_is_better else 1e3
        interval = "" if row.low is None else f"[{row.low:.3f}, {row.high:.3f}]"
        yield (
            f"{row.metric:<16}{scale * row.a:>12.2f}{scale * row.b:>12.2f}{row.ratio:>8.3f}"
            f"  {interval:<18}{row.verdict}"
        )


def bad(client: Mapping[str, Any]) -> bool:
    return bool(client.get("slow") or client.get("stood_still"))


def _row(
    metric: str, a: Values, b: Values, statistic: Statistic, *, more_is_better: bool = False
) -> list[Row]:
    a, b = [v for v in a if len(v)], [v for v in b if len(v)]
    if not a or not b:
        return []
    found = statistic(np.concatenate(a)), statistic(np.concatenate(b))
    if not min(found) > 0:
        return []
    low = high = None
    if min(sum(map(len, a)), sum(map(len, b))) >= FEWEST:
        rng = np.random.default_rng(0)
        above, below = _replicates(b, statistic, rng), _replicates(a, statistic, rng)
        ratios = above / np.maximum(below, 1e-12)
        tail = 100 * (1 - CONFIDENCE) / 2
        ratio, wider = found[1] / found[0], student(min(_blocks_in(a), _blocks_in(b)) - 1)
        low, high = (
            ratio * float(each / ratio) ** wider
            for each in np.percentile(ratios, (tail, 100 - tail))
        )
    return [Row(metric, *found, low, high, more_is_better)]


def _replicates(runs: Values, statistic: Statistic, rng: np.random.Generator) -> np.ndarray:
    """[REPLICATES] the statistic of resampled runs."""
    lengths = [block_length(values) for values in runs]

    def resampled() -> np.ndarray:
        drawn = rng.integers(len(runs), size=len(runs))
        return np.concatenate([_blocks(runs[i], lengths[i], rng) for i in drawn])

    return np.array([statistic(resampled()) for _ in range(REPLICATES)])


def _blocks(values: np.ndarray, length: int, rng: np.random.Generator) -> np.ndarray:
    """As many values, in blocks that begin anywhere and go on at the beginning."""
    count = len(values)
    starts = rng.integers(count, size=math.ceil(count / length))
    return values[((starts[:, None] + np.arange(length)) % count).ravel()[:count]]


def _blocks_in(runs: Values) -> int:
    return sum(len(values) // block_length(values) for values in runs)


def student(freedom: int) -> float:
    """How much wider Student's interval is than the normal one (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf((1 + CONFIDENCE) / 2)
    first = (z**2 + 1) / 4
    second = (5 * z**4 + 16 * z**2 + 3) / 96
    return 1 + first / freedom + second / freedom**2


def block_length(values: np.ndarray) -> int:
    """2 sqrt(n), or four times the integrated autocorrelation time where that is longer; n / 5 at
    most."""
    count = len(values)
    centred = values - values.mean()
    most = max(1, count // 5)
    variance = float(centred @ centred)
    time = 1.0
    for lag in range(1, most) if variance > 0 else ():
        correlation = float(centred[lag:] @ centred[:-lag]) / variance
        if correlation < 2 / math.sqrt(count):  # not told from none
            break
        time += 2 * correlation
    return min(most, max(round(2 * math.sqrt(count)), math.ceil(4 * time)))


def _latencies(result: Mapping[str, Any], name: str) -> np.ndarray:
    """Of the complete answers, in seconds; those that have no such number are left out."""
    requests = result["requests"]
    good = np.array(requests["outcome"]) == "ok"
    good &= ~np.array(requests["probe"], dtype=bool)
    scheduled, first, finished = (
        np.array(requests[key], dtype=float)[good] for key in ("scheduled", "first", "finished")
    )
    gaps = np.array(requests["max_gap"], dtype=float)[good]
    if name == "max_gap":
        return gaps[gaps > 0]
    if name == "tpot":
        tokens = np.array(requests["output_tokens"])[good]
        several = (tokens > 1) & (gaps > 0)  # as Record.tpot: not what came in one piece
        return (finished - first)[several] / (tokens[several] - 1)
    return (first if name == "ttft" else finished) - scheduled


def _rates(result: Mapping[str, Any], name: str) -> np.ndarray:
    """What was completed per second, in each of ``WINDOWS`` equal parts of the run."""
    requests, seconds = result["requests"], result["seconds"]
    good = (np.array(requests["outcome"]) == "ok") & ~np.array(requests["probe"], dtype=bool)
    finished = np.array(requests["finished"], dtype=float)[good]
    amounts = np.array(requests["output_tokens"])[good] if name == "output_tokens" else None
    if not len(finished) or not seconds > 0:
        return np.array([])
    totals, _ = np.histogram(finished, WINDOWS, range=(0, seconds), weights=amounts)
    return totals * (WINDOWS / seconds)

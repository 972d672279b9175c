"""Numbers of a group of requests; their definitions are in docs/benchmarks.md. Times in seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from deltaserve.bench.load.records import Outcome, Record
from deltaserve.bench.load.workload import Slo

PERCENTILES = (50, 90, 95, 99)

MEASURES: dict[str, Callable[[Record], Sequence[float]]] = {
    "ttft": lambda r: [r.ttft],
    "tpot": lambda r: [] if r.tpot is None else [r.tpot],
    "itl": lambda r: r.gaps,
    "e2e": lambda r: [r.e2e],
}


def summarise(records: Sequence[Record], slo: Slo, seconds: float) -> dict[str, Any]:
    """Counts, throughputs and latencies. seconds: of the run, also for a part of its requests.

    Only complete answers have latencies; planned cancellations are neither good nor failures.
    """
    good = [r for r in records if r.ok]
    inputs, outputs = sum(r.prompt_tokens for r in good), sum(r.output_tokens for r in good)
    failures = Counter(r.error for r in records if r.failed)
    per_second = 1 / seconds if seconds > 0 else 0.0
    summary: dict[str, Any] = {
        "requests": len(records),
        "completed": len(good),
        "failed": sum(failures.values()),
        "cancelled": sum(r.outcome is Outcome.CANCELLED for r in records),
        "empty": sum(not r.output_tokens for r in good),
        "uncounted": sum(not r.counted for r in good),
        "in_one_piece": sum(r.in_one_piece for r in good),
        "errors": dict(failures),
        "input_tokens": inputs,
        "cached_tokens": sum(r.cached_tokens for r in good),
        "output_tokens": outputs,
        "request_throughput": len(good) * per_second,
        "output_throughput": outputs * per_second,
        "total_throughput": (inputs + outputs) * per_second,
        "max_concurrent": max_concurrent(records),
    }
    for name, measure in MEASURES.items():
        summary[name] = distribution([value for r in good for value in measure(r)])
    summary["lateness"] = distribution([r.lateness for r in records])
    return summary | goodput(records, slo, per_second)


def goodput(records: Sequence[Record], slo: Slo, per_second: float) -> dict[str, Any]:
    """Requests per second that kept every objective, and the share that kept each. What failed
    missed them all; what was cancelled as planned does not count. None without objectives."""
    limits = slo.limits()
    counted = [r for r in records if r.outcome is not Outcome.CANCELLED]
    if not limits or not counted:
        return {"goodput": None, "slo_attainment": None, "slo_attainment_by_metric": {}}
    kept = {
        name: [r.ok and max(MEASURES[name](r), default=0.0) <= limit for r in counted]
        for name, limit in limits.items()
    }
    every = [all(each) for each in zip(*kept.values(), strict=True)]
    return {
        "goodput": sum(every) * per_second,
        "slo_attainment": sum(every) / len(counted),
        "slo_attainment_by_metric": {name: sum(v) / len(counted) for name, v in kept.items()},
    }


def distribution(values: Sequence[float]) -> dict[str, float] | None:
    """mean, std, max and percentiles (linear between neighbours); None without values."""
    if not values:
        return None
    array = np.asarray(values)
    found = np.percentile(array, PERCENTILES)
    return {
        "count": len(values),
        "mean": float(array.mean()),
        "std": float(array.std()),
        **{f"p{p}": float(value) for p, value in zip(PERCENTILES, found, strict=True)},
        "max": float(array.max()),
    }


def max_concurrent(records: Iterable[Record]) -> int:
    """Most requests between sending and end at one time."""
    # At equal times an end comes first: it makes room for the beginning.
    moments = sorted(m for r in records for m in ((r.sent, 1), (r.finished, -1)))
    most = now = 0
    for _, step in moments:
        now += step
        most = max(most, now)
    return most


def by(records: Iterable[Record], key: Callable[[Record], str]) -> dict[str, list[Record]]:
    """Groups in the order of their names."""
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return dict(sorted(groups.items()))

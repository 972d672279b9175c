"""A run as one JSON document, ``SCHEMA``; docs/benchmarks.md describes it."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deltaserve import __version__
from deltaserve.bench.load import scrape
from deltaserve.bench.load.fairness import fairness, slowdown
from deltaserve.bench.load.reading import read_json
from deltaserve.bench.load.records import Record
from deltaserve.bench.load.runner import Run
from deltaserve.bench.load.summary import by, distribution, summarise
from deltaserve.bench.load.workload import Threshold, Workload
from deltaserve.bench.record import machine
from deltaserve.errors import ConfigError

SCHEMA = "deltaserve-bench/1"
NEEDED = (
    *("name", "ended", "seconds", "workload", "workload_digest"),
    *("summary", "requests", "server", "thresholds"),
)
"""Of a result, by those that read one."""
SLOW_CLIENT_LAG = 0.05
"""A client whose timers fire this late in 1 % of the cases measures itself."""
STOOD_STILL = 1.0
"""Seconds that a timer is late only where the client was paused, or its machine slept."""


@dataclass
class Measured:
    """Everything from which the document is made."""

    workload: Workload
    run: Run
    target: dict[str, Any]
    started: str
    alone: dict[str, Run] = field(default_factory=dict)
    only: str = ""
    """The tenant whose run alone was cut, which is ``run`` then: the one of all never began."""
    series: scrape.Series = field(default_factory=scrape.Series)


def document(measured: Measured, *, detailed: bool = False) -> dict[str, Any]:
    """The result; ``detailed`` adds the time of every token."""
    workload, run = measured.workload, measured.run
    load = [record for record in run.records if not record.probe]
    probes = [record for record in run.records if record.probe]
    seconds = run.seconds

    def summary(records: Sequence[Record]) -> dict[str, Any]:
        return summarise(records, workload.slo, seconds)

    tenants = {name: summary(group) for name, group in by(load, lambda r: r.tenant).items()}
    weights = {tenant.name: tenant.weight for tenant in workload.tenants}
    result = {
        "schema": SCHEMA,
        "name": workload.name,
        "started": measured.started,
        "ended": run.ended,
        "only": measured.only,
        "seconds": seconds,
        "environment": environment(),
        "target": measured.target,
        "workload": workload.as_dict(),
        "workload_digest": workload.digest(),
        "summary": summary(load),
        "tenants": tenants,
        "models": {name: summary(group) for name, group in by(load, lambda r: r.model).items()},
        "probes": summary(probes) if workload.probes else None,
        "fairness": fairness(load, weights, workload.service_weights, seconds),
        "slowdown": _slowdowns(measured, tenants),
        "client": _client(run),
        "server": _server(measured.series, workload.settle),
        "requests": _columns(run.records, detailed=detailed),
    }
    result["thresholds"] = [check(result, each) for each in workload.thresholds]
    return result


def environment() -> dict[str, Any]:
    return machine() | {
        "deltaserve": __version__,
        "aiohttp": importlib.metadata.version("aiohttp"),
    }


def check(result: Mapping[str, Any], threshold: Threshold) -> dict[str, Any]:
    """The threshold with the value found, and whether it passed. What was not measured did not."""
    value = find(result, threshold.metric)
    measured = isinstance(value, int | float)
    passed = (
        measured
        and (threshold.max is None or value <= threshold.max)
        and (threshold.min is None or value >= threshold.min)
    )
    return {
        "metric": threshold.metric,
        "min": threshold.min,
        "max": threshold.max,
        "value": value if measured else None,
        "passed": passed,
    }


def find(result: Any, path: str) -> Any:
    """The value at ``tenants.polite.ttft.p99``; names may have dots of their own. None if none."""
    if not path:
        return result
    if not isinstance(result, Mapping):
        return None
    parts = path.split(".")
    for count in range(len(parts), 0, -1):
        name = ".".join(parts[:count])
        if name in result:
            return find(result[name], ".".join(parts[count:]))
    return None


def read_result(path: Path) -> dict[str, Any]:
    """Raises ConfigError: unreadable, or not a result of this schema."""
    content = read_json(path)
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise ConfigError(
            f"{path}: its schema is {schema!r}, not {SCHEMA!r}: measure again with this version"
        )
    if missing := [name for name in NEEDED if name not in content]:
        raise ConfigError(f"{path}: {missing[0]} is missing, so it is no whole result")
    return content


def _slowdowns(measured: Measured, tenants: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for name, run in measured.alone.items():
        load = [record for record in run.records if not record.probe]
        alone = summarise(load, measured.workload.slo, run.seconds)
        beside = {} if measured.only else tenants.get(name, {})
        found[name] = (slowdown(beside, alone) if beside else {}) | {"alone": alone}
    return found


def _client(run: Run) -> dict[str, Any]:
    """How the client itself fared. slow: its numbers are about itself, not the server;
    stood_still: the most seconds for which it did not run, 0 where it always did."""
    lag = distribution(run.lags)
    longest = lag["max"] if lag is not None else 0.0
    return {
        "lag": lag,
        "cpu_share": run.cpu_seconds / run.seconds if run.seconds else 0.0,
        "slow": lag is not None and lag["p99"] > SLOW_CLIENT_LAG,
        "stood_still": longest if longest > STOOD_STILL else 0.0,
    }


def _server(series: scrape.Series, settle: float) -> dict[str, Any]:
    summary = scrape.summarise(series, settle)
    values = {name: [value.get(name) for value in series.values] for name in series.names()}
    return {
        **scrape.derived(summary),
        "series": summary,
        "over_time": {"seconds": series.times, "values": values},
    }


def _columns(records: Sequence[Record], *, detailed: bool) -> dict[str, list[Any]]:
    """One list for each fact, requests in the order in which they were scheduled."""
    rows = sorted(records, key=lambda record: record.scheduled)
    columns: dict[str, list[Any]] = {
        "tenant": [r.tenant for r in rows],
        "model": [r.model for r in rows],
        "probe": [r.probe for r in rows],
        "turn": [r.turn for r in rows],
        "outcome": [str(r.outcome) for r in rows],
        "error": [r.error for r in rows],
        "message": [r.message for r in rows],
        "scheduled": [round(r.scheduled, 6) for r in rows],
        "sent": [round(r.sent, 6) for r in rows],
        "first": [round(r.scheduled + r.ttft, 6) for r in rows],
        "finished": [round(r.finished, 6) for r in rows],
        "prompt_tokens": [r.prompt_tokens for r in rows],
        "cached_tokens": [r.cached_tokens for r in rows],
        "output_tokens": [r.output_tokens for r in rows],
        "max_gap": [round(max(r.gaps, default=0.0), 6) for r in rows],
    }
    if detailed:
        columns["token_times"] = [[round(t, 6) for t in r.token_times] for r in rows]
    return columns

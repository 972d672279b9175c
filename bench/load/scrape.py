"""The server's side: its Prometheus metrics and ``/v1/stats``, and its process where it is ours."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

from deltaserve.bench.load.client import authorization
from deltaserve.bench.load.reading import parse_json

SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)")
LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
KEPT_LABELS = ("tier", "state", "reason")
"""Few values each; all other labels are summed over, or there would be a series per tenant."""
TIMEOUT = 5.0
MOST_SERIES = 400
MOST = 1e30
"""What is larger, or no number, tells nothing, and its sums are infinite."""

RSS, FDS = "process_resident_memory_bytes", "process_open_fds"
"""prometheus_client's names; the same are used for what /proc tells of a process of ours."""


@dataclass
class Series:
    """Samples: times in seconds since the start of the run, and what was seen then."""

    times: list[float] = field(default_factory=list)
    values: list[dict[str, float]] = field(default_factory=list)

    def names(self) -> list[str]:
        found: dict[str, None] = {}
        for value in self.values:
            found.update(dict.fromkeys(value))
        return list(found)[:MOST_SERIES]

    def of(self, name: str) -> list[tuple[float, float]]:
        pairs = zip(self.times, self.values, strict=True)
        return [(t, value[name]) for t, value in pairs if name in value]


@dataclass(frozen=True)
class Scraper:
    """Looks at a server every ``period`` seconds. pid: its process, if it was started here."""

    http: aiohttp.ClientSession
    url: str
    key: str
    period: float
    pid: int | None = None

    async def follow(self, clock: Callable[[], float], series: Series) -> None:
        """Until cancelled; a last look is the caller's."""
        while True:
            await self.look(clock, series)
            await asyncio.sleep(self.period)

    async def look(self, clock: Callable[[], float], series: Series) -> None:
        now = clock()
        metrics, stats = await asyncio.gather(self._get("/metrics"), self._get("/v1/stats"))
        values = parse_prometheus(metrics) if metrics else {}
        with contextlib.suppress(ValueError):
            values |= dict(flatten("stats", parse_json(stats))) if stats else {}
        if self.pid is not None:
            values |= process_usage(self.pid)
        if values:
            series.times.append(now)
            series.values.append(values)

    async def _get(self, path: str) -> str | None:
        with contextlib.suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with self.http.get(
                self.url + path,
                headers=authorization(self.key),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(TIMEOUT),
            ) as response:
                found = await response.text(errors="replace")
                return found if response.status == 200 else None
        return None


def parse_prometheus(text: str) -> dict[str, float]:
    """Counters and gauges by name, and by name and kept label; buckets are left out."""
    values: dict[str, float] = {}
    for line in text.splitlines():
        if not (match := SAMPLE.match(line)):
            continue
        name, labels, number = match.groups()
        if name.endswith(("_bucket", "_created")):
            continue
        try:
            value = float(number)
        except ValueError:
            continue
        if not abs(value) <= MOST:
            continue
        values[name] = values.get(name, 0.0) + value
        for label, text_value in LABEL.findall(labels or ""):
            if label in KEPT_LABELS:
                key = f"{name}{{{label}={text_value}}}"
                values[key] = values.get(key, 0.0) + value
    return values


def process_usage(pid: int) -> dict[str, float]:
    """Resident bytes and open descriptors of a process and its children; of Linux's /proc."""
    rss = descriptors = 0.0
    for each in _family(pid):
        with contextlib.suppress(OSError, ValueError, IndexError):
            pages = int(Path(f"/proc/{each}/statm").read_text().split()[1])
            rss += pages * os.sysconf("SC_PAGE_SIZE")
            descriptors += len(os.listdir(f"/proc/{each}/fd"))
    return {RSS: rss, FDS: descriptors} if rss else {}


def summarise(series: Series, settle: float = 0.0) -> dict[str, dict[str, float | None]]:
    """Of each series: first, last, mean, max, change (last - first), and growth after ``settle``
    seconds."""
    result: dict[str, dict[str, float | None]] = {}
    for name in series.names():
        samples = series.of(name)
        values = [value for _, value in samples]
        result[name] = {
            "first": values[0],
            "last": values[-1],
            "mean": sum(values) / len(values),
            "max": max(values),
            "change": values[-1] - values[0],
            "growth": _growth([value for time, value in samples if time >= settle]),
        }
    return result


def _growth(values: list[float]) -> float | None:
    """Mean of the last quarter over that of the first, minus 1; None without two quarters."""
    quarter = max(1, len(values) // 4)
    if len(values) < 2 * quarter:
        return None
    begin, end = sum(values[:quarter]), sum(values[-quarter:])
    return end / begin - 1 if begin else 0.0


def derived(summary: Mapping[str, Mapping[str, float | None]]) -> dict[str, float]:
    """Shares and rates that people ask for, from whichever names the server has."""

    def change(*names: str) -> float | None:
        return next((summary[name]["change"] for name in names if name in summary), None)

    prompt = change("stats.prompt_tokens", "vllm:prefix_cache_queries_total")
    cached = change("stats.cached_tokens", "vllm:prefix_cache_hits_total")
    hits, misses = change("stats.residency.hits"), change("stats.residency.misses")
    candidates = {
        "prefix_cache_hit_rate": _share(cached, prompt),
        "mixed_step_share": _share(change("stats.mixed_steps"), change("stats.steps")),
        "residency_hit_rate": _share(hits, None if misses is None else (hits or 0) + misses),
        "delta_loads": change("stats.residency.loads"),
        "delta_evictions": change("stats.residency.evictions"),
        "preemptions": change("stats.preemptions", "vllm:num_preemptions_total"),
    }
    return {name: value for name, value in candidates.items() if value is not None}


def _share(part: float | None, whole: float | None) -> float | None:
    return part / whole if part is not None and whole else None


def flatten(prefix: str, value: Any) -> Iterator[tuple[str, float]]:
    """Numbers of nested mappings; what is counted per tenant or model is left out."""
    for key, each in value.items() if isinstance(value, dict) else ():
        if isinstance(each, int | float):
            if abs(each) <= MOST:
                yield f"{prefix}.{key}", float(each)
        elif isinstance(each, dict) and not any(isinstance(v, dict) for v in each.values()):
            yield from flatten(f"{prefix}.{key}", each)


def _family(pid: int) -> Iterator[int]:
    yield pid
    with contextlib.suppress(OSError):
        for task in os.listdir(f"/proc/{pid}/task"):
            children = Path(f"/proc/{pid}/task/{task}/children").read_text().split()
            for child in children:
                yield from _family(int(child))

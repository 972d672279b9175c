"""One workload at many settings: every combination of the lists under its key ``sweep``.

    sweep:
      models: [4, 16]
      arrivals.rate: [1, 2, 4]

Each point has its own seed, so that it does not find the prompts of another in a cache; the
same point has the same seed on every server.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from deltaserve.bench.load.page import page, table
from deltaserve.bench.load.result import read_result
from deltaserve.bench.load.schema import convert
from deltaserve.bench.load.svg import Chart, colour, span
from deltaserve.bench.load.workload import Workload, make_workload, with_settings
from deltaserve.errors import ConfigError

COLUMNS = {
    "requests": "requests",
    "failed": "failed",
    "output_throughput": "tokens/s",
    "ttft_p50": "TTFT p50 ms",
    "ttft_p99": "TTFT p99 ms",
    "tpot_p50": "TPOT p50 ms",
    "e2e_p50": "E2E p50 ms",
}
"""Of a row, and what people call them."""


@dataclass(frozen=True)
class Point:
    """One combination: its number, what is set, and the whole workload."""

    number: int
    settings: tuple[tuple[str, Any], ...]
    workload: Workload

    @property
    def name(self) -> str:
        return ", ".join(f"{key}={label(value)}" for key, value in self.settings)

    @property
    def file(self) -> str:
        slug = re.sub(r"[^\w.=-]+", "_", self.name).strip("_")
        return f"{self.number:03d}-{slug[:100]}.json"


def points(content: Mapping[str, Any], *, rate_scale: float = 1.0) -> list[Point]:
    """All combinations, the last key changing fastest. ``rate_scale`` multiplies swept rates.

    Raises:
        ConfigError: no ``sweep``, or a combination that is no workload.
    """
    axes = content.get("sweep")
    if not isinstance(axes, dict) or not axes:
        raise ConfigError("the workload has no sweep: a mapping of keys to lists of values")
    if wrong := [key for key, values in axes.items() if not isinstance(values, list) or not values]:
        raise ConfigError(f"sweep.{wrong[0]} must be a list of values")
    rest = {key: value for key, value in content.items() if key != "sweep"}
    seed = convert(int, rest.get("seed", 0), "seed")
    found = []
    for number, values in enumerate(itertools.product(*axes.values())):
        settings = tuple(
            (key, _scaled(key, value, rate_scale))
            for key, value in zip(map(str, axes), values, strict=True)
        )
        # First, so that a swept seed is the one that is used.
        changed = with_settings(rest, [("seed", seed + 1000 * number), *settings])
        found.append(Point(number, settings, make_workload(changed, f"sweep point {number}")))
    return found


def _scaled(key: str, value: Any, rate_scale: float) -> Any:
    """What is no number is left to the workload to refuse."""
    rate = key.endswith("rate") and type(value) in (int, float)
    return value * rate_scale if rate else value


def done(point: Point, folder: Path) -> dict[str, Any] | None:
    """Its result, if this very workload was measured to its end before."""
    file = folder / point.file
    if not file.exists():
        return None
    result = read_result(file)
    same = result["workload_digest"] == point.workload.digest() and result["ended"] == "complete"
    return result if same else None


def row(point: Point, result: Mapping[str, Any]) -> dict[str, Any]:
    """What the overview shows of a point. Latencies in milliseconds, as in a run's report."""
    summary = result["summary"]
    numbers = {
        f"{name}_{which}": summary[name] and 1e3 * summary[name][which]
        for name, which in (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50"), ("e2e", "p50"))
    }
    chosen = {key: summary[key] for key in ("requests", "failed", "output_throughput")}
    return {
        "settings": {key: label(value) for key, value in point.settings},
        "file": point.file,
        "ended": result["ended"],
        "passed": all(each["passed"] for each in result["thresholds"]),
        **chosen,
        **numbers,
    }


def overview(name: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """The sweep as one HTML page: throughput against latency, and all numbers."""
    keys = list(rows[0]["settings"]) if rows else []
    cells = [
        [*each["settings"].values(), verdict(each), *(_number(each[column]) for column in COLUMNS)]
        for each in rows
    ]
    sections = [("All points", table([*keys, "", *COLUMNS.values()], cells))]
    for measure in ("ttft_p50", "e2e_p50"):
        sections.insert(
            0,
            (f"Throughput against {COLUMNS[measure].removesuffix(' ms')}", _curves(rows, measure)),
        )
    return page(f"Sweep: {name}", sections)


def text(rows: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    for each in rows:
        settings = ", ".join(f"{key}={value}" for key, value in each["settings"].items())
        numbers = ", ".join(f"{name} {_number(each[key])}" for key, name in COLUMNS.items())
        yield f"{settings}: {numbers}, {verdict(each)}"


def verdict(row: Mapping[str, Any]) -> str:
    """Of its thresholds, if it was measured to its end."""
    if row["ended"] != "complete":
        return str(row["ended"])
    return "PASS" if row["passed"] else "FAIL"


def label(value: Any) -> str:
    """A short name of a setting: "zipf 1.5"."""
    if isinstance(value, dict):
        return " ".join(label(each) for each in value.values())
    return f"{value:g}" if isinstance(value, float) else str(value)


def _curves(rows: Sequence[Mapping[str, Any]], measure: str) -> str:
    """One curve for each combination of the other axes; along it, the last one."""
    curves: dict[str, list[tuple[float, float]]] = {}
    tips: dict[str, list[str]] = {}
    for each in rows:
        if each[measure] is not None:
            *others, last = (f"{key}={value}" for key, value in each["settings"].items())
            name = ", ".join(others) or "all"
            curves.setdefault(name, []).append((each["output_throughput"], each[measure]))
            tips.setdefault(name, []).append(last)
    flat = [point for curve in curves.values() for point in curve]
    chart = Chart(
        span([x for x, _ in flat]),
        span([y for _, y in flat]),
        "generated tokens per second",
        COLUMNS[measure],
    )
    for index, (name, curve) in enumerate(curves.items()):
        chart.line(curve, colour(index), name)
        chart.dots(curve, colour(index), name, tips[name])
    return chart.render()


def _number(value: Any) -> str:
    return "-" if value is None else f"{value:.1f}" if isinstance(value, float) else str(value)

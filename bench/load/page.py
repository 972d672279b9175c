"""A result as one HTML file that needs nothing else: no scripts, no fonts, no requests."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from deltaserve.bench.load.svg import Chart, colour, span
from deltaserve.bench.load.text import MEASURES, render

MOST_ROWS = 500
"""Requests in the timeline; of more, evenly chosen ones are drawn, and the page says so."""
MOST_GROUPS = 20
"""Rows of a table of models or tenants."""
MOST_ITEMS = 20
"""Of a list in the environment and workload."""
MOST_LINES = 16
GROUP_HEAD = ("", "requests", "failed", "tokens/s", "TTFT p50", "TTFT p99", "TPOT p50", "E2E p99")
WINDOWS = 30
BAD = "var(--bad)"
RESIDENCY = ("residency.", "tier=", "deltas", "lora")
PROCESS = ("process_",)
LOAD = ("stats.running", "stats.waiting", "vllm:num_requests_running", "vllm:num_requests_waiting")

STYLE = """
:root{--c0:#2864c8;--c1:#d9691e;--c2:#2c9447;--c3:#9a4fc0;--c4:#11929c;--c5:#b8860b;--c6:#c2407d;
--c7:#6b7280;--bad:#d11f2d;--fg:#1c1e21;--bg:#fff;--soft:#e4e6ea;--dim:#5c6470}
@media(prefers-color-scheme:dark){:root{--c0:#6ea2f5;--c1:#f2955a;--c2:#5fc878;--c3:#c58be6;
--c4:#4cc3cc;--c5:#e0b84a;--c6:#ea7fb0;--c7:#a3abb8;--bad:#ff6570;--fg:#e8eaed;--bg:#17191c;
--soft:#33373d;--dim:#a2a9b4}}
body{font:15px/1.5 system-ui,sans-serif;color:var(--fg);background:var(--bg);margin:0 auto;
max-width:900px;padding:1.5rem}
h1{font-size:1.5rem;margin:0}h2{font-size:1.1rem;margin:2rem 0 .3rem}
p{margin:.3rem 0;color:var(--dim)}
svg{width:100%;min-width:560px;height:auto}
svg text{font-size:11px;fill:var(--dim)}svg .mid{text-anchor:middle}
svg .end{text-anchor:end}svg .label{font-size:12px}svg polyline{stroke-width:1.6}
svg .grid{stroke:var(--soft)}.legend span{display:inline-block;margin-right:1rem;font-size:.85rem}
.legend i{display:inline-block;width:.7rem;height:.7rem;margin-right:.3rem}
.wide{overflow-x:auto}table{border-collapse:collapse;font-size:.85rem}
th,td{white-space:nowrap;padding:.2rem .6rem;border-bottom:1px solid var(--soft);text-align:right}
th:first-child,td:first-child{text-align:left}.fail{color:var(--bad);font-weight:600}
pre{font-size:.8rem;overflow-x:auto}
"""


def page(title: str, sections: Sequence[tuple[str, str]], lead: str = "") -> str:
    """A whole document of (heading, HTML) sections."""
    body = "".join(f"<section><h2>{html.escape(h)}</h2>{text}</section>" for h, text in sections)
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{STYLE}</style></head>"
        f"<body><h1>{html.escape(title)}</h1>{lead}{body}</body></html>\n"
    )


def report(result: Mapping[str, Any]) -> str:
    """The page of one run."""
    lead = (
        f"<p>{html.escape(result['started'])}, {result['seconds']:.1f} s, "
        f"{html.escape(str(result['target'].get('url', '')))}, {html.escape(result['ended'])}</p>"
    )
    return page(f"Load test: {result['name']}", list(_sections(result)), lead)


def table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    def cells(values: Sequence[object], tag: str) -> str:
        return "".join(f"<{tag}>{html.escape(str(value))}</{tag}>" for value in values)

    body = "".join(
        f'<tr class="{"fail" if "FAIL" in map(str, row) else ""}">{cells(row, "td")}</tr>'
        for row in rows
    )
    return f'<div class="wide"><table><tr>{cells(head, "th")}</tr>{body}</table></div>'


def _sections(result: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if result["thresholds"]:
        yield "Thresholds", _thresholds(result["thresholds"])
    yield "Latency", _latencies(result["summary"])
    for kind in ("tenants", "models"):
        if len(result[kind]) > 1:
            yield f"By {kind[:-1]}", _groups(result[kind], result["slowdown"])
    if result["requests"]["scheduled"]:
        yield "Timeline of requests", _timeline(result)
        yield "Latency over time", _latency_over_time(result["requests"])
        yield "Throughput against latency", _throughput_against_latency(result)
    yield "Service of each tenant", _service(result["fairness"])
    over_time = result["server"]["over_time"]
    yield "Residency over time", _server_series(over_time, RESIDENCY)
    yield "Memory and open files of the server", _server_series(over_time, PROCESS)
    yield "Running and waiting in the server", _server_series(over_time, LOAD)
    yield "As text", f"<pre>{html.escape(render(result))}</pre>"
    about = _short({name: result[name] for name in ("environment", "target", "workload")})
    yield "Environment and workload", f"<pre>{html.escape(json.dumps(about, indent=1))}</pre>"


def _short(value: Any) -> Any:
    """The same without the ends of long lists: a thousand models or tenants tell nobody more."""
    if isinstance(value, Mapping):
        return {key: _short(each) for key, each in value.items()}
    if not isinstance(value, list | tuple):
        return value
    items = [_short(each) for each in value[:MOST_ITEMS]]
    more = len(value) - len(items)
    return [*items, f"... {more:,} more in the JSON"] if more else items


def _thresholds(thresholds: Sequence[Mapping[str, Any]]) -> str:
    rows = [
        (
            each["metric"],
            "not measured" if each["value"] is None else f"{each['value']:.4g}",
            "" if each["min"] is None else f"{each['min']:g}",
            "" if each["max"] is None else f"{each['max']:g}",
            "PASS" if each["passed"] else "FAIL",
        )
        for each in thresholds
    ]
    return table(["number", "measured", "at least", "at most", ""], rows)


def _latencies(summary: Mapping[str, Any]) -> str:
    columns = ("mean", "p50", "p90", "p95", "p99", "max")
    rows = [
        (title, *(f"{1e3 * summary[name][column]:.1f}" for column in columns))
        for name, (title, _) in MEASURES.items()
        if summary[name]
    ]
    return table(["milliseconds", *columns], rows)


def _groups(groups: Mapping[str, Any], slowdowns: Mapping[str, Any]) -> str:
    """A row for each of the busiest; the others are summed up in one."""
    busiest = set(sorted(groups, key=lambda name: -groups[name]["requests"])[:MOST_GROUPS])
    slow = any(slowdowns.get(name, {}).get("e2e_mean") for name in busiest)
    rows = [
        [name, *_group(found), *([_slowdown(slowdowns, name)] if slow else [])]
        for name, found in groups.items()
        if name in busiest
    ]
    rest = [found for name, found in groups.items() if name not in busiest]
    note = ""
    if rest:
        requests, failed = (sum(each[key] for each in rest) for key in ("requests", "failed"))
        output = sum(each["output_throughput"] for each in rest)
        blank = [""] * (len(GROUP_HEAD) - 4 + slow)
        rows.append([f"the other {len(rest):,}", requests, failed, f"{output:.1f}", *blank])
        note = (
            f"<p>The {MOST_GROUPS} with the most requests of {len(groups):,}; the others are "
            "summed up. All are in the JSON. Latencies in milliseconds.</p>"
        )
    return note + table([*GROUP_HEAD, *["slowdown"] * slow], rows)


def _group(found: Mapping[str, Any]) -> list[object]:
    measures = (("ttft", "p50"), ("ttft", "p99"), ("tpot", "p50"), ("e2e", "p99"))
    numbers = [
        f"{1e3 * found[measure][which]:.1f}" if found[measure] else "-"
        for measure, which in measures
    ]
    return [found["requests"], found["failed"], f"{found['output_throughput']:.1f}", *numbers]


def _slowdown(slowdowns: Mapping[str, Any], name: str) -> str:
    ratio = slowdowns.get(name, {}).get("e2e_mean")
    return f"{ratio:.2f}x" if ratio else "-"


def _timeline(result: Mapping[str, Any]) -> str:
    requests = result["requests"]
    count = len(requests["scheduled"])
    rows = np.linspace(0, count - 1, min(count, MOST_ROWS)).round().astype(int).tolist()
    tenants = list(result["tenants"])
    paints = {name: colour(index) for index, name in enumerate(tenants)}
    chart = Chart(
        (0, result["seconds"]), (0, len(rows)), "seconds", "request", height=120 + len(rows)
    )
    for row, i in enumerate(rows):
        failed = bool(requests["error"][i])
        # A probe's tenant may have sent nothing itself.
        paint = "var(--dim)" if requests["probe"][i] else paints[requests["tenant"][i]]
        paint = BAD if failed else paint
        first, end = min(requests["first"][i], requests["finished"][i]), requests["finished"][i]
        chart.bar(requests["scheduled"][i], first, row, paint, faint=True)
        chart.bar(first, end, row, paint)
    chart.names = [(name, colour(i)) for i, name in enumerate(tenants[:MOST_LINES])]
    chart.names.append(("failed", BAD))
    note = "Faint until the first token." + (
        f" {len(rows)} of {count} requests are drawn." if len(rows) < count else ""
    )
    return f"<p>{note}</p>{chart.render()}"


def _latency_over_time(requests: Mapping[str, Any]) -> str:
    good = [
        i for i, each in enumerate(requests["outcome"]) if each == "ok" and not requests["probe"][i]
    ]
    if not good:
        return "<p>No request was answered.</p>"
    times = np.array([requests["scheduled"][i] for i in good])
    charts = []
    for name, end in (("TTFT", "first"), ("E2E", "finished")):
        values = np.array([requests[end][i] for i in good]) - times
        chart = Chart(span(times), span(values), "seconds (scheduled)", f"{name}, seconds")
        thin = slice(None, None, max(1, len(good) // 1500))
        chart.dots(list(zip(times[thin], values[thin], strict=True)), "var(--dim)", "requests")
        edges = np.linspace(times.min(), times.max() + 1e-9, WINDOWS + 1)
        which = np.digitize(times, edges) - 1
        filled = [w for w in range(WINDOWS) if (which == w).any()]
        for index, percentile in enumerate((50, 90, 99)):
            middles = [(edges[w] + edges[w + 1]) / 2 for w in filled]
            heights = [float(np.percentile(values[which == w], percentile)) for w in filled]
            points = list(zip(middles, heights, strict=True))
            chart.line(points, colour(index), f"p{percentile}")
        charts.append(chart.render())
    return "".join(charts)


def _throughput_against_latency(result: Mapping[str, Any]) -> str:
    """A dot for each window of the run."""
    requests, seconds = result["requests"], result["seconds"]
    ok = np.array([each == "ok" for each in requests["outcome"]])
    ok &= ~np.array(requests["probe"], dtype=bool)
    if not ok.any():
        return "<p>No request was answered.</p>"
    finished = np.array(requests["finished"])[ok]
    tokens = np.array(requests["output_tokens"])[ok]
    e2e = finished - np.array(requests["scheduled"])[ok]
    which = np.minimum((finished / seconds * WINDOWS).astype(int), WINDOWS - 1)
    points, tips = [], []
    for window in sorted(set(which.tolist())):
        inside = which == window
        rate = float(tokens[inside].sum() / (seconds / WINDOWS))
        points.append((rate, float(np.median(e2e[inside]))))
        tips.append(f"{window * seconds / WINDOWS:.1f} s: {inside.sum()} requests")
    chart = Chart(
        span([x for x, _ in points]),
        span([y for _, y in points]),
        "generated tokens per second",
        "E2E p50, seconds",
    )
    chart.dots(points, colour(0), f"{seconds / WINDOWS:.2g} s of the run each", tips)
    return chart.render()


def _service(fairness: Mapping[str, Any]) -> str:
    over_time = fairness["over_time"]
    curves = over_time["service"]
    most = sorted(curves, key=lambda name: -curves[name][-1])[:MOST_LINES]
    highest = [curves[name][-1] for name in most] + [max(over_time["difference"], default=0.0)]
    chart = Chart(span(over_time["seconds"]), span(highest), "seconds", "service")
    for index, name in enumerate(most):
        points = list(zip(over_time["seconds"], curves[name], strict=True))
        chart.line(points, colour(index), name)
    if len(curves) > 1:
        points = list(zip(over_time["seconds"], over_time["difference"], strict=True))
        chart.line(points, BAD, "largest difference, by weight")
    note = (
        f"<p>The {MOST_LINES} most served of {len(curves)}.</p>" if len(curves) > len(most) else ""
    )
    return note + chart.render()


def _server_series(over_time: Mapping[str, Any], words: Sequence[str]) -> str:
    """A chart for each unit: bytes and counts do not share an axis. Limits are left out."""
    chosen = [
        name
        for name in over_time["values"]
        if any(word in name.removeprefix("deltaserve:") for word in words) and "_limit" not in name
    ]
    charts = []
    for unit in ("bytes", "seconds", "deltas", "count"):
        names = [n for n in chosen if _unit(n) == unit][:MOST_LINES]
        if not names:
            continue
        pairs = {
            name: [
                (time, value)
                for time, value in zip(over_time["seconds"], over_time["values"][name], strict=True)
                if value is not None
            ]
            for name in names
        }
        heights = [value for points in pairs.values() for _, value in points]
        chart = Chart(span(over_time["seconds"]), span(heights), "seconds", unit)
        for index, (name, points) in enumerate(pairs.items()):
            chart.line(points, colour(index), name)
        charts.append(chart.render())
    return "".join(charts) or "<p>The server reports nothing of the kind.</p>"


def _unit(name: str) -> str:
    """The numbers of deltas are apart from counters, which only rise and would dwarf them."""
    if name.partition("{")[0].endswith(("deltas", "residency.registered")):
        return "deltas"
    return next((unit for unit in ("bytes", "seconds") if unit in name), "count")

"""A result as text, laid out as users of vLLM's benchmark know it, with what that one lacks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

WIDTH = 50
MOST_ROWS = 20
"""Of models, and of tenants."""
MEASURES = {
    "ttft": ("Time to First Token", "TTFT"),
    "tpot": ("Time per Output Token (excl. 1st token)", "TPOT"),
    "itl": ("Inter-token Latency", "ITL"),
    "e2e": ("End-to-end Latency", "E2EL"),
}
PERCENTILES = ("p50", "p90", "p95", "p99")


def render(result: Mapping[str, Any]) -> str:
    """Times are in milliseconds here, as vLLM prints them; in the JSON they are seconds."""
    return "\n".join(_lines(result))


def _lines(result: Mapping[str, Any]) -> Iterator[str]:
    yield _title("Serving Benchmark Result", "=")
    yield from _overview(result)
    for name, (title, short) in MEASURES.items():
        yield from _latency(title, short, result["summary"][name])
    if result["probes"]:
        yield from _latency("Probes, Time to First Token", "probe TTFT", result["probes"]["ttft"])
    yield from _server(result["server"])
    yield "=" * WIDTH
    yield from _groups("tenant", result["tenants"], result["slowdown"])
    yield from _groups("model", result["models"], {})
    yield from _fairness(result)
    yield from _warnings(result)
    yield from verdicts(result["thresholds"])


def _overview(result: Mapping[str, Any]) -> Iterator[str]:
    summary = result["summary"]
    yield _row("Successful requests:", summary["completed"])
    yield _row("Failed requests:", summary["failed"])
    for kind, count in summary["errors"].items():
        yield _row(f"  {kind}:", count)
    if summary["cancelled"]:
        yield _row("Cancelled requests (planned):", summary["cancelled"])
    yield _row("Benchmark duration (s):", result["seconds"])
    yield _row("Total input tokens:", summary["input_tokens"])
    yield _row("Total generated tokens:", summary["output_tokens"])
    yield _row("Request throughput (req/s):", summary["request_throughput"])
    if summary["goodput"] is not None:
        yield _row("Request goodput (req/s):", summary["goodput"])
        yield _row("SLO attainment (%):", 100 * summary["slo_attainment"])
        for name, share in summary["slo_attainment_by_metric"].items():
            yield _row(f"  {name} (%):", 100 * share)
    yield _row("Output token throughput (tok/s):", summary["output_throughput"])
    yield _row("Total token throughput (tok/s):", summary["total_throughput"])
    yield _row("Peak concurrent requests:", summary["max_concurrent"])


def _latency(title: str, short: str, found: Mapping[str, float] | None) -> Iterator[str]:
    yield _title(title, "-")
    if found is None:
        yield _row(f"{short}:", "not measured")
        return
    yield _row(f"Mean {short} (ms):", 1e3 * found["mean"])
    for name in PERCENTILES:
        label = "Median" if name == "p50" else name.upper()
        yield _row(f"{label} {short} (ms):", 1e3 * found[name])
    yield _row(f"Max {short} (ms):", 1e3 * found["max"])


def _server(server: Mapping[str, Any]) -> Iterator[str]:
    facts = {k: v for k, v in server.items() if isinstance(v, int | float)}
    if facts:
        yield _title("Server", "-")
    for name, value in facts.items():
        yield _row(f"{name.replace('_', ' ').capitalize()}:", value)


def _groups(kind: str, groups: Mapping[str, Any], slowdowns: Mapping[str, Any]) -> Iterator[str]:
    if len(groups) < 2:
        return
    columns = ["requests", "failed", "tok/s", "TTFT p50", "p99", "TPOT p50", "E2E p50", "p99 ms"]
    columns += ["slowdown"] if slowdowns else []
    yield ""
    yield f"{kind:<24}" + "".join(f"{column:>10}" for column in columns)
    busiest = sorted(groups, key=lambda name: -groups[name]["requests"])[:MOST_ROWS]
    for name, found in groups.items():
        if name not in busiest:
            continue
        cells = [str(found["requests"]), str(found["failed"]), f"{found['output_throughput']:.1f}"]
        for measure, which in (
            ("ttft", "p50"),
            ("ttft", "p99"),
            ("tpot", "p50"),
            ("e2e", "p50"),
            ("e2e", "p99"),
        ):
            cells.append(f"{1e3 * found[measure][which]:.1f}" if found[measure] else "-")
        if slowdowns:
            ratio = slowdowns.get(name, {}).get("e2e_mean")
            cells.append(f"{ratio:.2f}x" if ratio else "-")
        yield f"{name:<24}" + "".join(f"{cell:>10}" for cell in cells)
    if len(groups) > MOST_ROWS:
        yield f"... the {MOST_ROWS} busiest of {len(groups):,}; all are in the JSON"


def _fairness(result: Mapping[str, Any]) -> Iterator[str]:
    if len(result["tenants"]) < 2:
        return
    fairness = result["fairness"]
    yield ""
    yield _title("Fairness between tenants", "-")
    yield _row("Jain index, service:", fairness["jain_service"] or "none")
    yield _row("Jain index, service per waited second:", fairness["jain_speed"] or "none")
    yield _row("Max service difference:", fairness["max_service_difference"])
    yield _row("  while both had requests waiting:", fairness["max_backlogged_service_difference"])


def _warnings(result: Mapping[str, Any]) -> Iterator[str]:
    if result["ended"] != "complete":
        yield f"PARTIAL: the run ended early: {result['ended']}."
    if result.get("only"):  # not in results of earlier versions
        yield f"These numbers are of {result['only']} alone; the run of all tenants never began."
    if still := result["client"].get("stood_still"):
        yield f"THE CLIENT STOOD STILL for {still:.1f} s: it was paused, or its machine slept. The"
        yield "latencies of the requests then under way are longer by that. Measure again."
    if result["client"]["slow"]:
        lag = result["client"]["lag"]["p99"]
        yield f"SLOW CLIENT: 1 % of its timers were {1e3 * lag:.0f} ms late or more; the latencies"
        yield "are partly its own. Use a machine with free cores, or less load."
    if result["summary"]["lateness"] and result["summary"]["lateness"]["p99"] > 0.1:
        late = result["summary"]["lateness"]["p99"]
        yield f"Requests waited in the client: p99 {1e3 * late:.0f} ms; latencies include it."
    if result["summary"]["empty"]:
        yield f"{result['summary']['empty']} answers had no tokens."
    if uncounted := result["summary"].get("uncounted"):
        yield f"{uncounted} answers came without usage: their prompts' tokens are unknown, and each"
        yield "part of such an answer counts as one token, however many it holds."
    if whole := result["summary"].get("in_one_piece"):
        yield f"{whole} answers of several tokens came in one piece, or without text: they have no"
        yield "TPOT and no ITL, and their TTFT is that of the whole answer."


def verdicts(thresholds: list[Mapping[str, Any]]) -> Iterator[str]:
    """One line for each threshold: what was found, what was asked, PASS or FAIL."""
    for each in thresholds:
        limits = [f"at least {each['min']:g}"] if each["min"] is not None else []
        limits += [f"at most {each['max']:g}"] if each["max"] is not None else []
        value = "not measured" if each["value"] is None else f"{each['value']:.4g}"
        verdict = "PASS" if each["passed"] else "FAIL"
        yield f"{verdict}  {each['metric']}: {value} ({' and '.join(limits)})"


def _title(text: str, fill: str) -> str:
    return f"{{:{fill}^{WIDTH}}}".format(f" {text} " if fill == "=" else text)


def _row(label: str, value: float | str) -> str:
    shown = f"{value:<10.2f}" if isinstance(value, float) else f"{value:<10}"
    return f"{label:<40}{shown}".rstrip()

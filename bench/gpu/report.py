"""The GPU benchmark's results as Markdown: ``python -m deltaserve.bench.gpu.report [RESULTS]``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Rows = list[dict[str, Any]]


def tables(results: Path, parts: list[str]) -> Iterator[str]:
    """Of the parts whose files are there."""
    for part in parts:
        file = results / f"gpu_{part}.json"
        make = TABLES.get(part)
        if make is None or not file.exists():
            continue
        content = json.loads(file.read_text())
        environment, found = content["environment"], content["results"]
        yield ""
        yield (
            f"{part}: {environment['gpu'] or 'CPU, smoke only'}, torch {environment['torch']}, "
            f"{environment['date']}, `{content['command']}`"
        )
        yield ""
        yield from make(found)
        yield from (f"left out: {what}" for what in found.get("left_out", []))


def kernels(found: dict[str, Any]) -> Iterator[str]:
    """By shape and format: the share of copy bandwidth, for each number of tenants and rows."""
    rows: Rows = found.get("rows", [])
    sizes = sorted({(row["tenants"], row["rows"]) for row in rows})
    yield f"A copy moves {found['copy_bytes_per_second'] / 1e9:.0f} GB/s."
    yield ""
    yield from header("shape", "format", *(f"{t} x {r}" for t, r in sizes))
    for shape, label in dict.fromkeys((row["shape"], row["format"]) for row in rows):
        own = {
            (row["tenants"], row["rows"]): f"{row['of_copy']:.0%} ({row['grouped_us']:.0f} µs)"
            for row in rows
            if (row["shape"], row["format"]) == (shape, label)
        }
        yield line(shape, label, *(own.get(size, "") for size in sizes))
    reached = [row["of_copy"] for row in rows if row["rows"] <= 16]
    if reached:
        good = sum(share >= 0.7 for share in reached)
        yield ""
        yield f"Goal, 70 % of a copy: met by {good} of {len(reached)}."
    yield ""
    yield from header("format", "shape", "dequantised from (rows)")
    for row in found.get("crossover", []):
        yield line(row["format"], row["shape"], row["dense_from"] or "never")


def decode(found: dict[str, Any]) -> Iterator[str]:
    yield from header("deltas", "tenants", "GB read", "step ms", "floor ms", "ratio", "tokens/s")
    for row in found.get("rows", []):
        label = row["format"] + ("" if row["captured"] else ", launched one by one")
        yield line(
            label,
            row["tenants"],
            f"{row['bytes'] / 1e9:.2f}",
            f"{row['step_ms']:.2f}",
            f"{row['floor_ms']:.2f}",
            f"{row['of_floor']:.2f}",
            f"{row['tokens_per_second']:.0f}",
        )
    yield ""
    yield "Goal: at most 1.3 times the floor."


def serving(found: dict[str, Any]) -> Iterator[str]:
    yield from header("way", "models", "tokens/s", "finished", "TTFT p50, p99 s", "loads")
    for row in found.get("rows", []):
        ttft = "" if row["ttft_p50"] is None else f"{row['ttft_p50']:.3f}, {row['ttft_p99']:.3f}"
        finished = f"{row['finished']} of {row['requests']}"
        rate = f"{row['tokens_per_second']:.0f}"
        yield line(row["way"], row["models"], rate, finished, ttft, row["loads"])
    if "over_swapping" in found:
        yield ""
        yield f"Goal, 12 times swapping: {found['over_swapping']:.1f}."


def cold(found: dict[str, Any]) -> Iterator[str]:
    yield from header("delta", "first token ms", "of warm", "samples")
    for row in found.get("rows", []):
        yield line(row["tier"], f"{row['ttft_ms']:.2f}", f"{row['over_warm']:.2f}", row["samples"])
    yield ""
    yield "Goal: from host memory at most 1.2 of warm."


def accuracy(found: dict[str, Any]) -> Iterator[str]:
    rows: Rows = found.get("rows", [])
    wrong = [row["operator"] for row in rows if not row["right"]]
    worst = max((row["error"] for row in rows), default=0.0)
    yield f"{len(rows)} operators and shapes against float64, largest error {worst:.1e}."
    yield from (f"Wrong: {name}" for name in wrong)


TABLES = {
    "kernels": kernels,
    "decode": decode,
    "serving": serving,
    "cold": cold,
    "accuracy": accuracy,
}


def header(*names: str) -> Iterator[str]:
    yield line(*names)
    yield line(*["---"] * len(names))


def line(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def main() -> None:
    results = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("bench/results")
    for text in tables(results, list(TABLES)):
        print(text)


if __name__ == "__main__":
    main()

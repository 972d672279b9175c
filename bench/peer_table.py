"""The table of README.md, made from what ``bench.peers --record`` wrote."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

RESULTS = Path("bench/results/peers.json")
README = Path("README.md")
BEGIN, END = "<!-- peers: made by bench/peer_table.py -->", "<!-- /peers -->"


def told(content: Mapping[str, Any]) -> str:
    """What was run where, and the table: a line for each server, columns for each number of
    models."""
    results: Sequence[Mapping[str, Any]] = content["results"]
    counts = sorted({each["num_models"] for each in results})
    servers = list(dict.fromkeys(each["server"] for each in results))
    found = {(each["server"], each["num_models"]): each for each in results}
    where = content["environment"]
    lines = [
        f"`{content['command']}`, {where['date']}, {where['cores']} cores of an {where['cpu']}, "
        f"torch {where['torch']}, transformers {where['transformers']}:",
        "",
        "| server | "
        + " | ".join(f"{n} fine-tune{'s' * (n > 1)}, tokens/s | compared" for n in counts)
        + " |",
        "|---" * (1 + 2 * len(counts)) + "|",
    ]
    for server in servers:
        cells = [cell for n in counts for cell in _cells(found.get((server, n)))]
        lines.append(f"| {server} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_table(text: str, content: Mapping[str, Any]) -> str:
    """text, what stands between the marks replaced. Raises SystemExit: it has no marks."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"no place for the table: the text has no {BEGIN} ... {END}")
    return f"{before}{BEGIN}\n{told(content)}\n{END}{after}"


def update_readme() -> None:
    """From the record, both below the current directory."""
    content = json.loads(RESULTS.read_text(encoding="utf-8"))
    README.write_text(with_table(README.read_text(encoding="utf-8"), content), encoding="utf-8")


def _cells(result: Mapping[str, Any] | None) -> tuple[str, str]:
    """Tokens/s, and how many times that the one it is compared with makes."""
    if result is None:
        return "not measured", ""
    if result["failures"]:
        kinds = ", ".join(f"{count} x {kind}" for kind, count in result["failures"].items())
        return f"none: {result['succeeded']} of {result['requests']} answered ({kinds})", ""
    rate = f"{result['tokens_per_second']:.0f}"
    ratio = result.get("ratio")  # older records have none
    if not ratio:
        return rate, ""
    spread = f"({min(ratio):.2f} - {max(ratio):.2f})"
    return rate, f"{result['against']} is {statistics.median(ratio):.2f}x {spread}"

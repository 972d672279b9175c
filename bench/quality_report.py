"""The quality benchmark's rows summed up: a table by method, and a plot of KL against size."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import Any

from deltaserve.bench.load.svg import Chart

# Of two scores on 128 prompts, and of two divergences, what is taken for equal.
SAME_GAIN, SAME_KL = 0.5 / 128, 1e-4
PAINTS = ("#0b62a4", "#c0392b")
STYLE = (
    "<style>text{font:12px sans-serif;fill:#444}.grid{stroke:#ddd}.mid{text-anchor:middle}"
    ".end{text-anchor:end}</style>"
)
LEAST_KL = 1e-6


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """By method: least and mean gain kept, mean ratios, geometric mean KL; and ours at each
    recipe's size: where it was worse in gain or in KL."""
    methods = []
    for name in dict.fromkeys(row["method"] for row in rows if not row["rival"]):
        mine = [row for row in rows if row["method"] == name]
        methods.append(_of_method(name, mine))
    return {"methods": methods, "at_equal_bytes": _beside(rows)}


def _of_method(name: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    def mean(key: str, some: list[dict[str, Any]]) -> float:
        return round(sum(row[key] for row in some) / len(some), 4)

    light = [row for row in rows if not row["heavy"]] or rows
    heavy = [row for row in rows if row["heavy"]]
    found = {
        "method": name,
        "ours": rows[0]["ours"],
        "resident_ratio": mean("resident_ratio", rows),
        "least_resident_ratio": min(row["resident_ratio"] for row in rows),
        "disk_ratio": mean("disk_ratio", rows),
        "gain": mean("gain", light),
        "least_gain": round(min(row["gain"] for row in light), 4),
        "kl": float(f"{_geometric([row['kl'] for row in light]):.3g}"),
    }
    if heavy:
        found["heavy_gain"] = mean("gain", heavy)
        found["heavy_kl"] = float(f"{_geometric([row['kl'] for row in heavy]):.3g}")
    return found


def _beside(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    published = {(row["fine_tune"], row["method"]): row for row in rows if not row["ours"]}
    found: dict[str, dict[str, Any]] = {}
    for ours in rows:
        if not ours["rival"]:
            continue
        theirs = published[ours["fine_tune"], ours["rival"]]
        entry = found.setdefault(
            ours["rival"], {"rival": ours["rival"], "runs": 0, "worse_gain": [], "worse_kl": []}
        )
        assert ours["resident_bytes"] <= theirs["resident_bytes"]
        entry["runs"] += 1
        if ours["gain"] < theirs["gain"] - SAME_GAIN:
            entry["worse_gain"].append([ours["fine_tune"], ours["gain"], theirs["gain"]])
        if ours["kl"] > theirs["kl"] + SAME_KL:
            entry["worse_kl"].append([ours["fine_tune"], ours["kl"], theirs["kl"]])
    return list(found.values())


def _geometric(values: list[float]) -> float:
    return math.exp(sum(math.log(max(LEAST_KL, value)) for value in values) / len(values))


def plot(rows: Sequence[dict[str, Any]]) -> str:
    """KL (log, geometric mean of all fine-tunes) by how many times smaller the delta is."""
    points = []
    for name in dict.fromkeys(row["method"] for row in rows if not row["rival"]):
        mine = [row for row in rows if row["method"] == name]
        ratio = sum(row["resident_ratio"] for row in mine) / len(mine)
        points.append(
            (ratio, math.log10(_geometric([r["kl"] for r in mine])), name, mine[0]["ours"])
        )
    low, high = (f(y for _, y, _, _ in points) for f in (min, max))
    chart = Chart(
        (0, 1.25 * max(x for x, _, _, _ in points)),
        (math.floor(low), math.ceil(high)),
        "times smaller than the fine-tune, in memory, everything included",
        "log10 of the KL divergence from the fine-tune, nats per token",
        height=420,
    )
    for paint, ours in zip(PAINTS, (True, False), strict=True):
        for x, y, name, mine in points:
            if mine == ours:
                chart.dots([(x, y)], paint, name, [name])
    return _standalone(chart, points)


def _standalone(chart: Chart, points: list[tuple[float, float, str, bool]]) -> str:
    """The chart as a file of its own, each dot labelled."""
    body = chart.render()
    body = body[body.index("<svg") :]
    left, top = 62, 12
    wide, high = chart.width - 74, chart.height - 52
    labels = []
    for x, y, name, _ in points:
        at_x = left + (x - chart.x[0]) / (chart.x[1] - chart.x[0]) * wide
        at_y = top + (1 - (y - chart.y[0]) / (chart.y[1] - chart.y[0])) * high
        labels.append(f'<text x="{at_x + 7:.1f}" y="{at_y + 4:.1f}">{html.escape(name)}</text>')
    opening = body.index(">") + 1
    head = body[:opening].replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" ')
    back = '<rect width="100%" height="100%" fill="white"/>'
    return head + STYLE + back + body[opening:].replace("</svg>", "".join(labels) + "</svg>\n")

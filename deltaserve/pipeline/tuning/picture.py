"""A trace as a picture: one SVG file that needs nothing else, also in a dark browser."""

from __future__ import annotations

import html
from pathlib import Path

from deltaserve.artifact.staging import replacing
from deltaserve.pipeline.trace import Trace
from deltaserve.pipeline.tuning.recommend import Advice

WIDTH, NAME, ROW, TOP, NUMBERS = 860, 170, 30, 64, 190
PARTS = (("on a core", "#2f6db5"), ("waits (lock, disk, network)", "#e0a33a"))
STYLE = (
    "text{font:13px system-ui,sans-serif;fill:#222}.small{font-size:11px;fill:#777}"
    ".limit{font-weight:bold;fill:#b3261e}rect.back{fill:#fff}"
    "@media(prefers-color-scheme:dark){text{fill:#ddd}rect.back{fill:#181818}"
    ".small{fill:#999}.limit{fill:#ff8a80}}"
)


def draw(trace: Trace, advice: Advice) -> str:
    """A bar for each operator: thread time per element of the root, divided by its threads, so
    that the longest bar is the slowest; what limits is marked."""
    rows = [
        (each, max(1, trace.operators[name].parallelism)) for name, each in advice.demands.items()
    ]
    longest = max((each.held_s / lanes for each, lanes in rows), default=0.0) or 1.0
    height = TOP + ROW * len(rows) + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" '
        f'role="img" aria-label="Time of each operator"><style>{STYLE}</style>'
        f'<rect class="back" width="{WIDTH}" height="{height}"/>',
        _text(12, 22, f"{trace.rate:.4g} elements/s; the consumer waits {trace.stall:.0%} of the "
                      f"time; {advice.bottleneck} limits"),
    ]  # fmt: skip
    for index, (label, colour) in enumerate(PARTS):
        left = 12 + 150 * index
        parts.append(f'<rect x="{left}" y="36" width="10" height="10" fill="{colour}"/>')
        parts.append(_text(left + 15, 45, label, "small"))
    scale = (WIDTH - NAME - NUMBERS) / longest
    for index, (each, lanes) in enumerate(rows):
        y, x = TOP + ROW * index, float(NAME)
        limits = each.name == advice.bottleneck
        parts.append(_text(12, y + 16, each.name, "limit" if limits else ""))
        for seconds, (_, colour) in zip((each.cpu_s, each.waited_s), PARTS, strict=True):
            size = seconds / lanes * scale
            parts.append(
                f'<rect x="{x:.1f}" y="{y + 3}" width="{size:.1f}" height="18" fill="{colour}"/>'
            )
            x += size
        told = f"{each.held_s / lanes * 1e3:.3g} ms"
        threads = advice.allocation.threads.get(each.stage, 1)
        if not each.serial:
            told += f", threads {lanes} -> {threads}"
        parts.append(_text(x + 6, y + 16, told, "small"))
    return "".join([*parts, "</svg>\n"])


def _text(x: float, y: float, text: str, kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}"{style}>{html.escape(text)}</text>'


def write(path: Path, trace: Trace, advice: Advice) -> None:
    with replacing(path) as partial:
        partial.write_text(draw(trace, advice), encoding="utf-8")

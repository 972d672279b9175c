"""Charts as inline SVG: axes, lines, dots, bars. Colours are CSS variables of the page."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

COLOURS = 8
"""Series colours that the page defines: --c0 to --c7."""
LEFT, RIGHT, TOP, BOTTOM = 62, 12, 12, 40
Point = tuple[float, float]


def colour(index: int) -> str:
    return f"var(--c{index % COLOURS})"


@dataclass
class Chart:
    """One plot; x and y are the ranges of its axes."""

    x: tuple[float, float]
    y: tuple[float, float]
    x_label: str
    y_label: str
    width: int = 860
    height: int = 280
    marks: list[str] = field(default_factory=list)
    names: list[tuple[str, str]] = field(default_factory=list)

    def line(self, points: Sequence[Point], paint: str, name: str = "") -> None:
        path = " ".join(f"{self._x(x):.1f},{self._y(y):.1f}" for x, y in points)
        self.marks.append(f'<polyline points="{path}" fill="none" stroke="{paint}"/>')
        self._name(name, paint)

    def dots(
        self, points: Sequence[Point], paint: str, name: str = "", tips: Sequence[str] = ()
    ) -> None:
        for i, (x, y) in enumerate(points):
            tip = f"<title>{html.escape(tips[i])}</title>" if tips else ""
            self.marks.append(
                f'<circle cx="{self._x(x):.1f}" cy="{self._y(y):.1f}" r="{4 if tips else 2}" '
                f'fill="{paint}">{tip}</circle>'
            )
        self._name(name, paint)

    def bar(self, begin: float, end: float, row: float, paint: str, *, faint: bool = False) -> None:
        """A horizontal bar, one unit of y high, from ``begin`` to ``end``."""
        left, right = self._x(begin), self._x(end)
        height = max(0.8, abs(self._y(row + 0.85) - self._y(row)))
        opacity = ' opacity="0.35"' if faint else ""
        self.marks.append(
            f'<rect x="{left:.1f}" y="{self._y(row + 0.85):.1f}" height="{height:.1f}" '
            f'width="{max(0.6, right - left):.1f}" fill="{paint}"{opacity}/>'
        )

    def _name(self, name: str, paint: str) -> None:
        if name and (name, paint) not in self.names:
            self.names.append((name, paint))

    def render(self) -> str:
        legend = "".join(
            f'<span><i style="background:{paint}"></i>{html.escape(name)}</span>'
            for name, paint in self.names
        )
        return (
            f'<div class="legend">{legend}</div>'
            f'<div class="wide"><svg viewBox="0 0 {self.width} {self.height}" role="img" '
            f'aria-label="{html.escape(self.y_label)} by {html.escape(self.x_label)}">'
            f"{self._axes()}{''.join(self.marks)}</svg></div>"
        )

    def _axes(self) -> str:
        bottom, right = self.height - BOTTOM, self.width - RIGHT
        parts = []
        for value in ticks(*self.x):
            x = self._x(value)
            parts.append(f'<line class="grid" x1="{x:.1f}" y1="{TOP}" x2="{x:.1f}" y2="{bottom}"/>')
            parts.append(f'<text x="{x:.1f}" y="{bottom + 14}" class="mid">{_short(value)}</text>')
        for value in ticks(*self.y):
            y = self._y(value)
            parts.append(f'<line class="grid" x1="{LEFT}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}"/>')
            parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" class="end">{_short(value)}</text>')
        parts.append(
            f'<text x="{(LEFT + right) / 2}" y="{self.height - 6}" class="mid label">'
            f"{html.escape(self.x_label)}</text>"
        )
        middle = (TOP + bottom) / 2
        parts.append(
            f'<text transform="translate(12 {middle}) rotate(-90)" class="mid label">'
            f"{html.escape(self.y_label)}</text>"
        )
        return "".join(parts)

    def _x(self, value: float) -> float:
        low, high = self.x
        return LEFT + (value - low) / max(high - low, 1e-12) * (self.width - LEFT - RIGHT)

    def _y(self, value: float) -> float:
        low, high = self.y
        part = (value - low) / max(high - low, 1e-12)
        return self.height - BOTTOM - part * (self.height - TOP - BOTTOM)


def _short(value: float) -> str:
    """2.5G rather than 2.5e+09"""
    for size, letter in ((1e9, "G"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"


def ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Round values inside the range, about ``count`` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / count
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= rough)
    first = math.ceil(low / step)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def span(values: Iterable[float]) -> tuple[float, float]:
    """From 0 to a little above all values."""
    highest = max(values, default=0.0)
    return 0.0, 1.05 * highest if highest > 0 else 1.0

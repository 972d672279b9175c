"""What ``deltaserve select`` reads of its options and says of its result."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from deltaserve.errors import ConfigError

PLAIN_WIDTH = 120


def parse_counts(given: Sequence[str]) -> dict[str, int]:
    """["news=20", ...] as a dict. Raises ConfigError."""
    counts = {}
    for each in given:
        name, _, number = each.rpartition("=")
        if not name or not number.isdecimal():
            raise ConfigError(f"--count needs NAME=N, not {each!r}")
        counts[name] = int(number)
    return counts


def print_receipt(receipt: dict[str, Any], out: Path) -> None:
    """The comparison with the baselines, the explanation, and where everything lies."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(width=PLAIN_WIDTH, highlight=False)
    table = Table()
    for column, justify in (("", "left"), ("samples", "right"), ("objective", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("score", justify="right")
    table.add_column("shared", justify="right")
    selected = receipt["selected"]
    table.add_row(
        "selected",
        f"{selected:,}",
        f"{receipt['objective']:.4f}",
        _score(receipt["score"]),
        f"{selected:,}",
    )
    for name, each in receipt["baselines"].items():
        table.add_row(
            name,
            f"{each['samples']:,}",
            f"{each['objective']:.4f}",
            _score(each["score"]),
            f"{each['shared']:,}",
        )
    console.print(table)
    for line in receipt["explanation"]:
        console.print(line, markup=False)
    console.print(
        f"{selected:,} of {receipt['pool']['samples']:,} samples are in {out}",
        markup=False,
        soft_wrap=True,
    )


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:.1f}"

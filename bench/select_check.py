"""A measured figure beside what it is held to."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Check:
    """value: measured; bound: what was asked, in words; passed: None where nothing was asked."""

    part: str
    name: str
    value: float | str
    bound: str = ""
    passed: bool | None = None


class Report:
    def __init__(self) -> None:
        self.checks: list[Check] = []

    def at_least(self, part: str, name: str, value: float, bound: float) -> None:
        self.add(Check(part, name, value, f">= {bound:g}", bool(value >= bound)))

    def at_most(self, part: str, name: str, value: float, bound: float) -> None:
        self.add(Check(part, name, value, f"<= {bound:g}", bool(value <= bound)))

    def within(self, part: str, name: str, value: float, low: float, high: float) -> None:
        self.add(Check(part, name, value, f"{low:g} to {high:g}", bool(low <= value <= high)))

    def fact(self, part: str, name: str, value: float | str) -> None:
        self.add(Check(part, name, value))

    def add(self, check: Check) -> None:
        self.checks.append(check)
        print(_line(check), file=sys.stderr, flush=True)

    def rows(self) -> list[dict[str, Any]]:
        return [asdict(check) for check in self.checks]


def show(checks: Sequence[Check]) -> None:
    print(f"{'part':<7}{'figure':<66}{'measured':>14}  {'asked':<16}")
    for check in checks:
        print(_line(check))
    failed = sum(check.passed is False for check in checks)
    print(f"{sum(check.passed is True for check in checks)} passed, {failed} failed")


def _line(check: Check) -> str:
    value = check.value if isinstance(check.value, str) else f"{check.value:.6g}"
    verdict = {True: "pass", False: "FAIL", None: ""}[check.passed]
    return f"{check.part:<7}{check.name:<66}{value:>14}  {check.bound:<16}{verdict}"

"""Cuts at random elements: the state goes on bit for bit, whoever computes the rows.

Each of the six cases runs once without workers, and the state before each element is kept. Each
cut restores one of these with other workers, by turns none, threads and processes, and compares
what follows and the state that is saved then.
"""

from __future__ import annotations

import hashlib
import json
import random
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.bench.pipeline_cases import Case
from deltaserve.bench.pipeline_text import write
from deltaserve.bench.select_check import Report
from deltaserve.pipeline.iterator import open_pipeline
from deltaserve.pipeline.plan import Plan

CUTS = 200
# Of each case: several packing windows. And compared behind a cut.
ELEMENTS, AHEAD = 48, 10
STATE_BYTES = 1_000_000


def resume(report: Report, seed: int, cases: Sequence[Case], cuts: int = CUTS) -> None:
    draw = random.Random(seed)
    exact: Counter[str] = Counter()
    tried: Counter[str] = Counter()
    largest = 0
    with tempfile.TemporaryDirectory() as folder:
        corpus = write(Path(folder), seed=seed)
        for number, case in enumerate(cases):
            plan = case.make(corpus)
            states, whole = _whole(plan)
            largest = max(largest, *(len(json.dumps(state)) for state in states))
            for at in range(number, cuts, len(cases)):
                # Not by the number of the cut, or each case would have its own kind.
                kind, workers = _workers(at // len(cases), draw)
                tried[kind] += 1
                cut = draw.randrange(ELEMENTS - AHEAD)
                exact[kind] += _goes_on(plan, states, whole, cut, workers)
            report.fact("resume", f"{case.name}: cuts so far", tried.total())
    for kind in tried:
        report.fact("resume", f"cuts restored with {kind}", tried[kind])
    report.at_least(
        "resume", "share of cuts that went on exactly", exact.total() / tried.total(), 1
    )
    report.at_most("resume", "bytes of the largest state", largest, STATE_BYTES)


def digest(element: dict[str, Any]) -> str:
    """Of all values, with their types and shapes."""
    hashed = hashlib.sha256()
    for name in sorted(element):
        value = element[name]
        known = isinstance(value, np.ndarray)
        text = f"{value.dtype}{value.shape}{value.tolist()}" if known else repr(value)
        hashed.update(f"{name}={text};".encode())
    return hashed.hexdigest()


def _whole(plan: Plan) -> tuple[list[dict[str, Any]], list[str]]:
    """The state before each element and after the last, and the elements."""
    with open_pipeline(plan) as elements:
        states, found = [elements.get_state()], []
        for _ in range(ELEMENTS):
            found.append(digest(next(elements)))
            states.append(elements.get_state())
    return states, found


def _workers(turn: int, draw: random.Random) -> tuple[str, dict[str, Any]]:
    kinds: tuple[tuple[str, dict[str, Any]], ...] = (
        ("no workers", {}),
        ("threads", {"threads": draw.randint(1, 4)}),
        ("processes", {"processes": draw.randint(1, 2)}),
    )
    return kinds[turn % len(kinds)]


def _goes_on(
    plan: Plan, states: list[dict[str, Any]], whole: list[str], cut: int, workers: dict[str, Any]
) -> bool:
    with open_pipeline(plan, **workers) as elements:
        elements.set_state(json.loads(json.dumps(states[cut])))
        found = [digest(next(elements)) for _ in range(AHEAD)]
        # What is saved now must be what an uninterrupted run saves.
        return found == whole[cut : cut + AHEAD] and elements.get_state() == states[cut + AHEAD]

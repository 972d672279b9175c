"""A plan's operators alone, on sampled rows: what of their time holds the lock, what waits.

Beside a running pipeline that cannot be told, where all wait for the same lock.
"""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from deltaserve.pipeline.compiling import segment_roots
from deltaserve.pipeline.elements import element
from deltaserve.pipeline.node import Node
from deltaserve.pipeline.plan import Plan
from deltaserve.pipeline.rows import Row
from deltaserve.pipeline.segments import Leaf, leaves_of
from deltaserve.pipeline.sources import Source, open_source
from deltaserve.pipeline.tuning.gil import calibrate, measure
from deltaserve.pipeline.tuning.program import Line, fit_bandwidth
from deltaserve.pipeline.tuning.rates import Lone
from deltaserve.pipeline.tuning.sizing import kept_bytes, rows_at, sample

READERS = (1, 2, 4, 8)
LISTS = 8
"""Sampled lists that operators are run on."""


@dataclass(frozen=True)
class Calibration:
    """lone: of each operator that workers run. transfer: seconds to send a row to another
    process, by the operator that makes it. rows: of each source. bytes: of a cache behind each
    operator. parts: of fused operators, the share of the time that each part takes. bandwidth: of
    sources that wait for their files, see `Resources`."""

    lone: dict[str, Lone] = field(default_factory=dict)
    transfer: dict[str, float] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, float] = field(default_factory=dict)
    parts: dict[str, dict[str, float]] = field(default_factory=dict)
    bandwidth: dict[str, list[Line]] = field(default_factory=dict)


def calibrated(plan: Plan, seconds: float = 0.2) -> Calibration:
    """Of a prepared plan; seconds: of each operator, twice by one thread and by four.

    Raises PipelineError: what the operators raise.
    """
    found = Calibration()
    for root, _ in segment_roots(plan):
        for leaf in leaves_of(root):
            if leaf.source.name not in found.lone:
                _leaf(leaf, seconds, found)
    return found


def _leaf(leaf: Leaf, seconds: float, found: Calibration) -> None:
    source = open_source(leaf.source)
    try:
        found.rows[leaf.source.name] = len(source)
        numbers = sample(source, LISTS)
        if not numbers:
            return
        found.lone[leaf.source.name] = _alone(source.read, numbers, seconds)
        if lines := _bandwidth(source, numbers, seconds):
            found.bandwidth[leaf.source.name] = lines
        lists = [rows_at(source, each) for each in numbers]
        found.transfer[leaf.source.name] = _sending(lists)
        calls = []
        for node in leaf.elements:
            if node.op == "cache":
                continue
            call = element(node)
            calls.append((node.name, call))
            if node.name not in found.lone and any(lists):
                found.lone[node.name] = _alone(call, lists, seconds)
                if node.op == "fused":
                    found.parts[node.name] = _shares(node, lists)
            lists = [call(rows) for rows in lists]
            found.transfer[node.name] = _sending(lists)
        found.bytes.update(kept_bytes(source, leaf.source.name, calls, seconds))
    finally:
        source.close()


def _alone(call: Callable[[Any], Any], lists: list[list[Any]], seconds: float) -> Lone:
    """Per row taken."""
    size = sum(map(len, lists)) / len(lists)
    whole = calibrate(call, lists, seconds)
    return Lone(whole.gil, whole.waited_s / max(size, 1.0))


def _bandwidth(source: Source, numbers: list[list[int]], seconds: float) -> list[Line]:
    """Bytes a second by several numbers of threads; none if it computes more than it waits."""
    rates = []
    for threads in READERS:
        start, before = time.perf_counter(), source.bytes_read
        usage = measure(source.read, numbers, threads, seconds)
        rates.append((source.bytes_read - before) / (time.perf_counter() - start))
        if usage.waited_s < usage.cpu_s or not rates[-1]:
            return []
    return fit_bandwidth(READERS, rates)


def _shares(node: Node, lists: list[list[Row]]) -> dict[str, float]:
    spent: dict[str, float] = {}
    for part in node.params["parts"]:
        call, start = element(part), time.perf_counter()
        lists = [call(rows) for rows in lists]
        spent[part.name] = time.perf_counter() - start
    whole = sum(spent.values())
    return {name: seconds / whole for name, seconds in spent.items()}


def _sending(lists: list[list[Row]]) -> float:
    """CPU seconds a row to pickle it, which is about what it takes to read it again."""
    rows = sum(map(len, lists))
    start = time.thread_time()
    for each in lists:
        pickle.dumps(each)
    return (time.thread_time() - start) / max(rows, 1)

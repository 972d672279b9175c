"""The controller on a running pipeline: windows from its trace, and the thread that looks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from deltaserve.pipeline.trace import Trace, difference
from deltaserve.pipeline.tuning.controller import Controller, StageWindow, Window
from deltaserve.pipeline.tuning.rates import Demand, demands


class Adjustable(Protocol):
    def trace(self) -> Trace: ...

    def set_parallelism(self, node_name: str, n: int) -> None: ...


def window(before: Trace, after: Trace) -> Window | None:
    """What the controller is shown; None while nothing was finished. Nor can be said what rows
    cost that were all made before: a list counts when it is done."""
    moved = difference(before, after)
    if moved.elements <= 0 or not moved.operators[moved.root].made:
        return None
    if any(each.handed and not each.made for each in moved.operators.values()):
        return None
    parts: dict[str, list[Demand]] = {}
    for each in demands(moved).values():
        parts.setdefault(each.stage, []).append(each)
    stages = {
        name: _stage(each, moved.operators[each[0].name].parallelism)
        for name, each in parts.items()
    }
    gap = moved.consumer_ns / moved.elements / 1e9
    return Window(moved.elements, moved.wall_ns / 1e9, moved.stalled_ns / 1e9, gap, stages)


def _stage(operators: list[Demand], threads: int) -> StageWindow:
    held_s = sum(each.held_s for each in operators)
    # Behind a filter lists are shorter, so that this is the most that it may take.
    lot_s = sum(each.held_s * each.lot / each.visits for each in operators if each.visits)
    return StageWindow(held_s, threads, any(each.serial for each in operators), lot_s)


class Autotuner:
    """Looks once a period, in a thread of its own, from ``start`` to ``stop``.

    changed: told of every change, {stage: threads}.
    """

    def __init__(
        self,
        pipeline: Adjustable,
        controller: Controller,
        period_s: float = 1.0,
        changed: Callable[[dict[str, int]], None] = lambda change: None,
    ) -> None:
        self._pipeline, self._controller = pipeline, controller
        self._period_s, self._changed = period_s, changed
        self._before = pipeline.trace()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, name="autotuner", daemon=True)

    def start(self) -> Autotuner:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._ended.set()
        if self._thread.is_alive():
            self._thread.join()

    def look(self) -> dict[str, int]:
        """One period: what was changed. A period that says nothing joins the next."""
        now = self._pipeline.trace()
        seen = window(self._before, now)
        if seen is None:
            return {}
        self._before = now
        change = self._controller.step(seen)
        for name, threads in change.items():
            self._pipeline.set_parallelism(name, threads)
        if change:
            self._changed(change)
        return change

    def _run(self) -> None:
        while not self._ended.wait(self._period_s):
            self.look()

"""The controller on a running pipeline: windows from its trace, and the thread that looks."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Protocol

from deltaserve.pipeline.trace import Trace, difference
from deltaserve.pipeline.tuning.controller import Controller, StageWindow, Window
from deltaserve.pipeline.tuning.rates import demands


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
    stages: dict[str, StageWindow] = {}
    for each in demands(moved).values():
        known = stages.get(each.stage)
        held = each.held_s + (known.held_s if known else 0.0)
        serial = each.serial or bool(known and known.serial)
        stages[each.stage] = StageWindow(held, moved.operators[each.name].parallelism, serial)
    gap = moved.consumer_ns / moved.elements / 1e9
    return Window(moved.elements, moved.wall_ns / 1e9, moved.stalled_ns / 1e9, gap, stages)


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

"""Keeps a running pipeline just fast enough: threads up where the trainer waits, down after.

Once a period it is shown what happened (`Window`). While the trainer waits, only the slowest
stage gets threads, as many as the demand needs, at most twice what it has; when that brought
nothing (cores or the lock are the limit) they are taken back and the stage is left alone until
the demand or the costs change. When nobody waits and a stage could do with fewer threads for
several periods in a row, it gives some back. No clock and no threads in here: the caller has them,
so tests run it on virtual time.

What a rise brought is not seen at once. The rate before it may have lived on rows that were
ready, so it counts as no more than the stage's threads can make; and rows come in lists, of which
those under way end first, and one may take longer than a period.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

MARGIN = 1.25
HEDGE = 2


@dataclass(frozen=True)
class StageWindow:
    """held_s: thread time per element of the root; threads: now; serial: cannot have more.
    lot_s: how long a thread works until it hands something on."""

    held_s: float
    threads: int
    serial: bool = False
    lot_s: float = 0.0


@dataclass(frozen=True)
class Window:
    """One period: elements delivered, its length, how long the trainer waited, and stages.

    gap_s: the trainer's own time between two elements; 1 / gap_s is its demand.
    """

    elements: int
    wall_s: float
    stalled_s: float
    gap_s: float
    stages: Mapping[str, StageWindow]

    @property
    def stall(self) -> float:
        return self.stalled_s / self.wall_s if self.wall_s > 0 else 0.0

    @property
    def rate(self) -> float:
        return self.elements / self.wall_s if self.wall_s > 0 else 0.0


@dataclass
class Controller:
    """``step`` gives the stages whose threads are to change.

    max_threads: of one stage. tolerated: share of the time that the trainer may wait.
    patience: periods in a row before threads are given back. gain: what a rise must bring.
    changed: by how much a stage's cost or the demand must differ from when a rise failed for
    it to be tried again.
    """

    max_threads: int
    tolerated: float = 0.01
    patience: int = 3
    gain: float = 0.03
    changed: float = 0.2
    _idle: dict[str, int] = field(default_factory=dict)
    _raised: tuple[str, int, float] | None = None
    _due_s: float = 0.0
    _given_up: dict[str, tuple[float, float]] = field(default_factory=dict)

    def step(self, window: Window) -> dict[str, int]:
        if window.elements == 0 or window.wall_s <= 0:
            return {}
        self._forget(window)
        if window.stall > self.tolerated:
            self._idle.clear()
            if self._raised is not None and self._due_s > 0:
                self._due_s -= window.wall_s
                return {}
            return self._take_back(window) or self._raise(window)
        self._raised = None
        return self._release(window)

    def _forget(self, window: Window) -> None:
        """What was given up under other circumstances may be tried again."""
        for name, (held, gap) in list(self._given_up.items()):
            stage = window.stages.get(name)
            if stage is None or _differs(stage.held_s, held, self.changed) or _differs(
                window.gap_s, gap, self.changed
            ):  # fmt: skip
                del self._given_up[name]

    def _take_back(self, window: Window) -> dict[str, int]:
        """The last rise, if it brought nothing."""
        if self._raised is None:
            return {}
        (name, before, rate), self._raised = self._raised, None
        if window.rate >= rate * (1 + self.gain):
            return {}
        self._given_up[name] = (window.stages[name].held_s, window.gap_s)
        return {name: before}

    def _raise(self, window: Window) -> dict[str, int]:
        able = {
            name: stage
            for name, stage in window.stages.items()
            if not stage.serial and stage.threads < self.max_threads and name not in self._given_up
        }
        if not able:
            return {}
        name = max(able, key=lambda each: able[each].held_s / able[each].threads)
        stage = able[name]
        slowest = max(each.held_s / max(1, each.threads) for each in window.stages.values())
        if stage.held_s / stage.threads < 0.5 * slowest:
            return {}  # a stage that cannot be raised is the limit
        wanted = max(stage.threads + 1, self._needed(stage, window.gap_s))
        wanted = min(wanted, 2 * stage.threads, self.max_threads)
        made = stage.threads / stage.held_s if stage.held_s > 0 else window.rate
        self._raised = name, stage.threads, min(window.rate, made)
        self._due_s = 2 * stage.lot_s
        return {name: wanted}

    def _release(self, window: Window) -> dict[str, int]:
        changes = {}
        for name, stage in window.stages.items():
            needed = max(HEDGE, self._needed(stage, window.gap_s))
            if stage.serial or needed >= stage.threads:
                self._idle.pop(name, None)
                continue
            self._idle[name] = self._idle.get(name, 0) + 1
            if self._idle[name] >= self.patience:
                # Half of what is too much at a time: an estimate that is off does not stall.
                changes[name] = stage.threads - math.ceil((stage.threads - needed) / 2)
                self._idle[name] = 0
        return changes

    def _needed(self, stage: StageWindow, gap_s: float) -> int:
        """Threads for the trainer's demand, with some to spare."""
        if gap_s <= 0:
            return self.max_threads
        return min(self.max_threads, math.ceil(MARGIN * stage.held_s / gap_s - 1e-9))


def _differs(now: float, then: float, share: float) -> bool:
    return abs(now - then) > share * max(then, 1e-12)

"""Time that passes only when nothing else is to be done.

The load generator is asyncio code; on this loop it is simulated unchanged: where a real loop
would sleep until the next timer, this one sets its clock to it.
"""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualSelector(selectors.DefaultSelector):
    """Looks at files without waiting (Ctrl-C comes through one), and lets time pass instead."""

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        ready = super().select(0)
        if not ready:
            assert timeout is not None, "the simulation waits for something that never comes"
            self.now += max(timeout, 0.0)
        return ready


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose ``time`` begins at 0 and costs nothing."""

    def __init__(self) -> None:
        self._virtual = VirtualSelector()
        super().__init__(self._virtual)

    def time(self) -> float:
        return self._virtual.now


class StepClock:
    """The clock of one engine: the loop's, or ahead of it in a step that is being simulated.

    A step is decided in one moment and takes time all the same; its engine sees that time pass
    at once, everybody else when ``caught_up`` has waited for it.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._ahead = 0.0

    def __call__(self) -> float:
        return max(self._loop.time(), self._ahead)

    def pass_time(self, seconds: float) -> None:
        self._ahead = self() + seconds

    async def caught_up(self) -> None:
        await asyncio.sleep(max(0.0, self._ahead - self._loop.time()))


def run(main: Coroutine[Any, Any, T]) -> T:
    """``asyncio.run`` in virtual time."""
    with asyncio.Runner(loop_factory=VirtualLoop) as runner:
        return runner.run(main)

"""Which workers are alive, how busy they are, and how fast."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass
class _Worker:
    seen: float
    node: str = ""
    throughput: float = 0.0
    leases: int = 0
    suspected: float = float("-inf")
    """When somebody got no answer from it; until its next sign of life others come first."""


class Workers:
    """limit_s: a worker that was silent for longer is dead. presumed: alive at ``now``."""

    def __init__(self, limit_s: float, presumed: Iterable[str], now: float) -> None:
        self._limit = limit_s
        self._workers = {name: _Worker(now) for name in presumed}

    def beat(self, name: str, node: str, throughput: float, now: float) -> bool:
        """A sign of life. True: the worker is new, or was dead."""
        worker = self._workers.get(name)
        new = worker is None or now - worker.seen > self._limit
        if worker is None or new:
            worker = self._workers[name] = _Worker(now)
        worker.seen, worker.node = now, node
        worker.throughput = throughput or worker.throughput
        return new

    def remove(self, name: str) -> None:
        self._workers.pop(name, None)

    def suspect(self, name: str, now: float) -> None:
        if name in self._workers:
            self._workers[name].suspected = now

    def alive(self, now: float) -> list[str]:
        for name in [n for n, w in self._workers.items() if now - w.seen > 10 * self._limit]:
            del self._workers[name]
        return sorted(n for n, w in self._workers.items() if now - w.seen <= self._limit)

    def choose(self, now: float, node: str = "") -> str:
        """The best of the living: not suspected, on the node, with the least to do. Empty: none
        is left."""

        def order(name: str) -> tuple[bool, int, bool, str]:
            worker = self._workers[name]
            suspected = worker.suspected >= worker.seen
            return suspected, worker.leases, bool(node) and worker.node != node, name

        return min(self.alive(now), key=order, default="")

    def take(self, now: float, node: str = "") -> str:
        """Choose one, and count a lease for it."""
        name = self.choose(now, node)
        if name:
            self._workers[name].leases += 1
        return name

    def give_back(self, name: str) -> None:
        if name in self._workers:
            self._workers[name].leases = max(0, self._workers[name].leases - 1)

    def throughputs(self, now: float) -> list[float]:
        found = (self._workers[name].throughput for name in self.alive(now))
        return [throughput for throughput in found if throughput > 0]

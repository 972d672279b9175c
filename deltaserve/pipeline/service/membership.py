"""Which workers are alive, how busy they are, and how fast."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

# Splits that a worker on the consumer's own host has at hand before others are asked.
LOCAL_DEPTH = 2


@dataclass
class _Worker:
    seen: float
    node: str = ""
    rates: dict[str, float] = field(default_factory=dict)
    leases: int = 0
    suspected: float = float("-inf")
    """When somebody got no answer from it; until its next sign of life it gets nothing."""


class Workers:
    """limit_s: a worker that was silent for longer is dead. presumed: alive at ``now``."""

    def __init__(self, limit_s: float, presumed: Iterable[str], now: float) -> None:
        self._limit = limit_s
        self._workers = {name: _Worker(now) for name in presumed}

    def beat(self, name: str, node: str, rates: Mapping[str, float], now: float) -> None:
        """A sign of life. rates: of each job, what it prepares in a second of work."""
        worker = self._workers.get(name)
        if worker is None or now - worker.seen > self._limit:
            worker = self._workers[name] = _Worker(now)
        worker.seen, worker.node = now, node
        worker.rates.update(rates)

    def remove(self, name: str) -> None:
        self._workers.pop(name, None)

    def suspect(self, name: str, now: float) -> None:
        if name in self._workers:
            self._workers[name].suspected = now

    def alive(self, now: float) -> list[str]:
        for name in [n for n, w in self._workers.items() if now - w.seen > 10 * self._limit]:
            del self._workers[name]
        return sorted(n for n, w in self._workers.items() if now - w.seen <= self._limit)

    def choose(self, now: float, load: Mapping[str, int], node: str = "") -> str:
        """The best of those that live and are not suspected, empty if there is none: on the
        node, while it is not busy; with the least to do. load: what each has to do beside its
        leases."""

        def order(name: str) -> tuple[bool, int, str]:
            worker = self._workers[name]
            todo = worker.leases + load.get(name, 0)
            near = bool(node) and worker.node == node and todo < LOCAL_DEPTH
            return not near, todo, name

        trusted = [n for n in self.alive(now) if self._workers[n].suspected < self._workers[n].seen]
        return min(trusted, key=order, default="")

    def lease(self, name: str, change: int) -> None:
        """Count one lease more or less."""
        if name in self._workers:
            self._workers[name].leases = max(0, self._workers[name].leases + change)

    def leases(self, name: str) -> int:
        return self._workers[name].leases if name in self._workers else 0

    def rates(self, job: str, now: float) -> list[float]:
        found = (self._workers[name].rates.get(job, 0.0) for name in self.alive(now))
        return [rate for rate in found if rate > 0]

"""Which of several engines gets a request.

Delta-aware: consistent hashing with bounded loads (Mirrokni, Thorup and Zadimoghaddam 2016).
Each delta prefers the engines in an order of its own, so that its weights and computed prefixes
are in one place; one that has more than its share of requests passes it on to the next, so that a
popular delta spreads over as many engines as it needs, always the same ones.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from typing import Protocol

SLACK = 1.25
"""An engine may have so many times the mean of the requests in flight."""


class Loaded(Protocol):
    @property
    def load(self) -> int: ...


class Router:
    """Chooses by index; all engines serve all models."""

    def __init__(self, how: str, engines: Sequence[Loaded]) -> None:
        self._how = how
        self._engines = engines
        self._turns = itertools.count()

    def choose(self, model: str) -> int:
        loads = [engine.load for engine in self._engines]
        count = len(loads)
        if self._how == "round_robin":
            return next(self._turns) % count
        least = min(range(count), key=lambda i: loads[i])
        if self._how == "least_loaded" or count == 1:
            return least
        limit = SLACK * (sum(loads) + 1) / count
        order = sorted(range(count), key=lambda i: _rank(model, i))
        return next((i for i in order if loads[i] + 1 <= limit), least)


def _rank(model: str, engine: int) -> bytes:
    # Not a checksum: of those, that of the last character would decide for all models alike.
    return hashlib.blake2b(f"{model}/{engine}".encode(), digest_size=8).digest()

"""How many workers: what the consumers' own hosts cannot prepare, over what a worker prepares.

The rule is tf.data service's (ceil of demand over throughput, outliers replaced by the median,
growth capped), with the consumers' own hosts counted first: their cores are paid for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

GROWTH = 4
# Fewer workers only when this many evaluations in a row agree: starting one costs seconds.
PATIENCE = 3


@dataclass(frozen=True)
class Demand:
    """A second's worth of positions (or, of a hosted stream, elements): what a consumer would
    take if it never waited, and what its own host (``node``) prepares."""

    wanted: float
    local: float = 0.0
    node: str = ""

    @property
    def unmet(self) -> float:
        return max(0.0, self.wanted - self.local)


def need(unmet: float, rates: Sequence[float]) -> float:
    """Workers that a job keeps busy. rates: what each worker prepares in a second of work; while
    none is known, one worker is to find out."""
    if unmet <= 0:
        return 0.0
    return unmet / robust_mean(rates) if len(rates) else 1.0


class Scaler:
    def __init__(self) -> None:
        self._lower = 0

    def target(self, needs: Sequence[float], now: int) -> int:
        """Workers wanted, given ``now`` there are; 0 when no job needs any."""
        busy = sum(needs)
        # Half a percent of slack, or noise in a measurement would add a worker.
        wanted = max(1, math.ceil(busy - 0.005)) if busy > 0 else 0
        wanted = min(wanted, GROWTH * max(now, 1))
        self._lower = self._lower + 1 if wanted < now else 0
        if 0 < self._lower < PATIENCE:
            return now
        self._lower = 0
        return wanted


def robust_mean(values: Sequence[float]) -> float:
    """The mean, with what lies beyond one deviation of it replaced by the median."""
    array = np.asarray(values, float)
    far = np.abs(array - array.mean()) > array.std() * (1 + 1e-9)
    return float(np.where(far, np.median(array), array).mean())

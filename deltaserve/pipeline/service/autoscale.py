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
    """Source positions a second: wanted by a consumer, and prepared by its own host."""

    wanted: float
    local: float = 0.0

    @property
    def unmet(self) -> float:
        return max(0.0, self.wanted - self.local)


class Scaler:
    def __init__(self) -> None:
        self._lower = 0

    def target(self, demands: Sequence[Demand], throughputs: Sequence[float], now: int) -> int:
        """Workers wanted, given ``now`` there are; 0 without demand."""
        unmet = sum(demand.unmet for demand in demands)
        if unmet <= 0:
            wanted = 0
        elif not throughputs:
            wanted = max(now, 1)
        else:
            # Half a percent of slack, or noise in a measurement would add a worker.
            wanted = math.ceil(unmet / robust_mean(throughputs) - 0.005)
            wanted = min(max(wanted, 1), GROWTH * max(now, 1))
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

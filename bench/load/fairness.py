"""Who got how much service, when: as in VTC (Sheng et al., OSDI 2024), a weighted sum of tokens.

Service is counted where a client can see it: a prompt's when its answer begins, a generated
token's when it comes.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltaserve.bench.load.records import Record
from deltaserve.bench.load.summary import by

GRID = 500
"""Moments at which service is compared."""
MOST_PAIRED = 32
"""Tenants, of the most served, that are compared in pairs."""


def jain(values: Sequence[float]) -> float | None:
    """(sum x)^2 / (n sum x^2): 1 when all are equal, 1/n when one has everything."""
    squares = sum(value**2 for value in values)
    return sum(values) ** 2 / (len(values) * squares) if squares else None


def fairness(
    records: Sequence[Record],
    weights: Mapping[str, float],
    prices: tuple[float, float],
    seconds: float,
) -> dict[str, Any]:
    """Fairness between tenants, and the service of each over time.

    Args:
        weights: tenant -> its share; its service is divided by it.
        prices: of a token of a prompt, and of a generated one.
    """
    groups = by(records, lambda record: record.tenant)
    grid = np.linspace(0.0, seconds, GRID)
    service = {name: _served(group, prices, grid) for name, group in groups.items()}
    share = np.array([service[name] / weights[name] for name in groups]).reshape(-1, GRID)
    waiting = np.array([_waiting(group, grid) for group in groups.values()]).reshape(-1, GRID)
    total = {name: float(curve[-1]) for name, curve in service.items()}
    speed = {
        name: total[name] / weights[name] / max(sum(r.e2e for r in group), 1e-9)
        for name, group in groups.items()
    }
    spread = share.max(axis=0) - share.min(axis=0) if len(groups) else np.zeros(GRID)
    return {
        "service": total,
        "service_per_waited_second": speed,
        "jain_service": jain([total[name] / weights[name] for name in groups]),
        "jain_speed": jain(list(speed.values())),
        "max_service_difference": float(spread.max()),
        "max_backlogged_service_difference": _backlogged_difference(share, waiting),
        "over_time": {
            "seconds": grid.tolist(),
            "difference": spread.tolist(),
            "service": {name: curve.tolist() for name, curve in service.items()},
        },
    }


def slowdown(together: Mapping[str, Any], alone: Mapping[str, Any]) -> dict[str, float]:
    """Ratios of two summaries of a tenant: beside the others over alone."""
    found = {}
    for measure, which in itertools.product(("ttft", "tpot", "e2e"), ("mean", "p50", "p99")):
        if together[measure] and alone[measure] and alone[measure][which]:
            found[f"{measure}_{which}"] = together[measure][which] / alone[measure][which]
    return found


def _served(records: Sequence[Record], prices: tuple[float, float], grid: np.ndarray) -> np.ndarray:
    """[GRID] service until each moment."""
    times, amounts = [0.0], [0.0]
    for record in records:
        if parts := len(record.token_times):
            times.append(record.token_times[0])
            amounts.append(prices[0] * record.prompt_tokens)
            times += record.token_times
            amounts += [prices[1] * record.output_tokens / parts] * parts
    order = np.argsort(times, kind="stable")
    cumulative = np.cumsum(np.asarray(amounts)[order])
    return cumulative[np.searchsorted(np.asarray(times)[order], grid, side="right") - 1]


def _waiting(records: Sequence[Record], grid: np.ndarray) -> np.ndarray:
    """[GRID] whether any request was sent and had no answer yet."""
    steps = np.zeros(len(grid) + 1)
    for record in records:
        answered = record.token_times[0] if record.token_times else record.finished
        begin, end = np.searchsorted(grid, (record.sent, answered))
        steps[begin] += 1
        steps[end] -= 1
    return np.cumsum(steps)[:-1] > 0


def _backlogged_difference(share: np.ndarray, waiting: np.ndarray) -> float:
    """The most that one tenant got more than another while both had requests waiting."""
    most = 0.0
    top = np.argsort(-share[:, -1])[:MOST_PAIRED]
    for one, other in itertools.combinations(top, 2):
        difference = share[one] - share[other]
        both = np.flatnonzero(waiting[one] & waiting[other])
        for interval in np.split(both, np.flatnonzero(np.diff(both) > 1) + 1):
            if len(interval) > 1:
                most = max(most, float(np.ptp(difference[interval])))
    return most

"""Which candidate stores which tensor: the least error for the bytes, over all tensors at once.

A knapsack with one choice per tensor, solved by one Lagrange multiplier (Shoham and Gersho,
IEEE ASSP 1988): where every tensor minimises error + price * bytes, no other choice of the
same total size has less error. What the last price leaves over is filled greedily.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from deltaserve.compress.plan import CodecChoice

HALVINGS = 60


@dataclass(frozen=True)
class Candidate:
    """bytes in memory; error: nats per token that it is predicted to cost."""

    choice: CodecChoice
    bytes: int
    error: float


Table = Mapping[str, Sequence[Candidate]]


def smallest(table: Table) -> int:
    """Bytes of the smallest allocation."""
    return sum(min(c.bytes for c in candidates) for candidates in table.values())


def largest(table: Table) -> int:
    """Bytes of the most exact allocation."""
    return _size(_at_price(table, 0.0))


def allocate(table: Table, budget: int) -> dict[str, Candidate]:
    """A candidate per tensor within ``budget`` bytes, or the smallest if none fits."""
    cheap, dear = 0.0, 1.0
    best = {name: min(c, key=lambda c: (c.bytes, c.error)) for name, c in table.items()}
    while _size(_at_price(table, dear)) > budget and dear < 1e30:
        dear *= 10
    for _ in range(HALVINGS):
        price = (cheap + dear) / 2
        chosen = _at_price(table, price)
        if _size(chosen) <= budget:
            best, dear = chosen, price
        else:
            cheap = price
    return _fill(table, best, budget)


def predicted(chosen: Mapping[str, Candidate]) -> float:
    """Divergence of an allocation, nats per token, by the candidates' own errors."""
    return sum(candidate.error for candidate in chosen.values())


def hull(candidates: Sequence[Candidate]) -> Callable[[int], float]:
    """The least error that mixtures of these candidates have at given bytes: what lies above is
    the best choice at no price."""
    corners: list[Candidate] = []
    for c in sorted(candidates, key=lambda c: (c.bytes, c.error)):
        if corners and c.error >= corners[-1].error:
            continue
        while len(corners) > 1 and _slope(corners[-2], c) <= _slope(corners[-2], corners[-1]):
            corners.pop()
        corners.append(c)

    def error(size: int) -> float:
        if size < corners[0].bytes:
            return math.inf
        for low, high in pairwise(corners):
            if size <= high.bytes:
                return low.error + _slope(low, high) * (size - low.bytes)
        return corners[-1].error

    return error


def _slope(low: Candidate, high: Candidate) -> float:
    return (high.error - low.error) / (high.bytes - low.bytes)


def _at_price(table: Table, price: float) -> dict[str, Candidate]:
    return {
        name: min(candidates, key=lambda c: (c.error + price * c.bytes, c.bytes))
        for name, candidates in table.items()
    }


def _fill(table: Table, chosen: dict[str, Candidate], budget: int) -> dict[str, Candidate]:
    """Spend what is left where a byte saves most."""
    chosen = dict(chosen)
    while True:
        left = budget - _size(chosen)
        steps = [
            ((chosen[name].error - c.error) / (c.bytes - chosen[name].bytes), name, c)
            for name, candidates in table.items()
            for c in candidates
            if 0 < c.bytes - chosen[name].bytes <= left and c.error < chosen[name].error
        ]
        if not steps:
            return chosen
        _, name, candidate = max(steps, key=lambda step: step[0])
        chosen[name] = candidate


def _size(chosen: Mapping[str, Candidate]) -> int:
    return sum(candidate.bytes for candidate in chosen.values())

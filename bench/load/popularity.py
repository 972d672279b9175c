"""Which model a request asks for. A chooser gets the request's time and gives a model's index."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from deltaserve.bench.load.schema import not_negative, positive

Chooser = Callable[[float], int]


@dataclass(frozen=True)
class Uniform:
    """Every model as likely as the others."""

    kind: ClassVar[str] = "uniform"

    def chooser(self, rng: np.random.Generator, count: int) -> Chooser:
        return lambda time: int(rng.integers(count))


@dataclass(frozen=True)
class Zipf:
    """The k-th model with a probability proportional to k**-alpha (DeltaZip's: 1.5)."""

    kind: ClassVar[str] = "zipf"
    alpha: float = 1.5

    def __post_init__(self) -> None:
        not_negative(alpha=self.alpha)

    def chooser(self, rng: np.random.Generator, count: int) -> Chooser:
        weights = zipf(count, self.alpha)
        return lambda time: int(rng.choice(count, p=weights))


@dataclass(frozen=True)
class RoundRobin:
    """One after the other, in the server's order."""

    kind: ClassVar[str] = "round_robin"

    def chooser(self, rng: np.random.Generator, count: int) -> Chooser:
        state = iter(range(2**62))
        return lambda time: next(state) % count


@dataclass(frozen=True)
class Distinct:
    """No model twice before each was asked: random orders of all models, one after the other."""

    kind: ClassVar[str] = "distinct"

    def chooser(self, rng: np.random.Generator, count: int) -> Chooser:
        order: list[int] = []

        def choose(time: float) -> int:
            if not order:
                order.extend(rng.permutation(count).tolist())
            return order.pop()

        return choose


@dataclass(frozen=True)
class OnOffModels:
    """In every ``period`` seconds only a share ``active`` of the models is asked, chosen anew; the
    k-th of them with a probability proportional to k**-alpha."""

    kind: ClassVar[str] = "on_off"
    period: float = 10.0
    active: float = 0.25
    alpha: float = 0.0

    def __post_init__(self) -> None:
        positive(period=self.period, active=self.active)
        not_negative(alpha=self.alpha)
        if self.active > 1:
            raise ValueError(f"active is {self.active:g}, but is a share: at most 1")

    def chooser(self, rng: np.random.Generator, count: int) -> Chooser:
        size = max(1, round(self.active * count))
        weights = zipf(size, self.alpha)
        seed = int(rng.integers(2**31))

        def choose(time: float) -> int:
            hot = np.random.default_rng((seed, int(time / self.period))).permutation(count)[:size]
            return int(rng.choice(hot, p=weights))

        return choose


@dataclass(frozen=True)
class TraceModels:
    """As in the trace that the arrivals replay: its most frequent model is the server's first."""

    kind: ClassVar[str] = "trace"


Popularity = Uniform | Zipf | RoundRobin | Distinct | OnOffModels | TraceModels


def zipf(count: int, alpha: float) -> np.ndarray:
    """Probabilities of ranks 1 to ``count``."""
    weights = np.arange(1, count + 1, dtype=float) ** -alpha
    return weights / weights.sum()

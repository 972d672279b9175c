"""When requests are sent: open loops at times that do not depend on answers, and closed loops.

Every open loop yields ``Row``s in order of time, in seconds from the start, without end unless
a file ends it. Rates are requests per second.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np

from deltaserve.bench.load.schema import not_negative, positive
from deltaserve.bench.load.traces import PUBLISHED, Row, read_trace, shrunk, synthetic

Known = Literal[
    "azure-code",
    "azure-conv",
    "azure-code-2024",
    "azure-conv-2024",
    "burstgpt",
    "mooncake-conversation",
]

UNKNOWN = Row(0.0, 0, 0)
"""A row that knows nothing but its time."""


@dataclass(frozen=True)
class Constant:
    """Equal gaps."""

    kind: ClassVar[str] = "constant"
    rate: float

    def __post_init__(self) -> None:
        positive(rate=self.rate)

    def rows(self, rng: np.random.Generator) -> Iterator[Row]:
        count = 0
        while True:
            yield replace(UNKNOWN, time=count / self.rate)
            count += 1


@dataclass(frozen=True)
class Gamma:
    """Gaps from Gamma(burstiness, 1 / (rate * burstiness)), as in vLLM's benchmark: 1 is Poisson,
    less is burstier. Unlike there, the times are not stretched to end at exactly N / rate."""

    kind: ClassVar[str] = "gamma"
    rate: float
    burstiness: float = 1.0

    def __post_init__(self) -> None:
        positive(rate=self.rate, burstiness=self.burstiness)

    def rows(self, rng: np.random.Generator) -> Iterator[Row]:
        time = 0.0
        while True:
            time += rng.gamma(self.burstiness, 1 / (self.rate * self.burstiness))
            yield replace(UNKNOWN, time=time)


@dataclass(frozen=True)
class Poisson:
    """Independent arrivals."""

    kind: ClassVar[str] = "poisson"
    SHORT: ClassVar[str] = "rate"
    rate: float

    def __post_init__(self) -> None:
        positive(rate=self.rate)

    def rows(self, rng: np.random.Generator) -> Iterator[Row]:
        return _poisson(rng, lambda area: area / self.rate)


@dataclass(frozen=True)
class OnOff:
    """Poisson arrivals: ``busy`` seconds at ``rate``, ``quiet`` ones at ``quiet_rate``, and again.
    (Not "on" and "off", which YAML takes for true and false.)"""

    kind: ClassVar[str] = "on_off"
    rate: float
    busy: float
    quiet: float
    quiet_rate: float = 0.0

    def __post_init__(self) -> None:
        positive(rate=self.rate, busy=self.busy, quiet=self.quiet)
        not_negative(quiet_rate=self.quiet_rate)

    def rows(self, rng: np.random.Generator) -> Iterator[Row]:
        return _poisson(rng, self._time)

    def _time(self, area: float) -> float:
        many = self.rate * self.busy
        periods, rest = divmod(area, many + self.quiet_rate * self.quiet)
        start = periods * (self.busy + self.quiet)
        if rest <= many:
            return start + rest / self.rate
        return start + self.busy + (rest - many) / self.quiet_rate


@dataclass(frozen=True)
class Ramp:
    """Poisson arrivals whose rate goes from ``start`` to ``end`` in ``seconds``, and stays."""

    kind: ClassVar[str] = "ramp"
    start: float
    end: float
    seconds: float
    shape: Literal["linear", "exponential"] = "linear"

    def __post_init__(self) -> None:
        positive(start=self.start, end=self.end, seconds=self.seconds)

    def rows(self, rng: np.random.Generator) -> Iterator[Row]:
        return _poisson(rng, self._time)

    def _time(self, area: float) -> float:
        """The inverse of the expected number of arrivals until a time."""
        if self.start == self.end:
            return area / self.start
        growth = self.end - self.start
        if self.shape == "linear":
            total = (self.start + self.end) / 2 * self.seconds
            slope = growth / self.seconds
            root = math.sqrt(max(0.0, self.start**2 + 2 * slope * min(area, total)))
            time = (root - self.start) / slope
        else:
            log = math.log(self.end / self.start)
            total = growth * self.seconds / log
            inside = min(area, total) * log / (self.start * self.seconds)
            time = self.seconds / log * math.log1p(inside)
        return time if area <= total else self.seconds + (area - total) / self.end


@dataclass(frozen=True)
class AtOnce:
    """Everything at time 0. Needs a number of requests."""

    kind: ClassVar[str] = "at_once"

    def rows(self, rng: np.random.Generator) -> Iterator[Row]:
        while True:
            yield UNKNOWN


@dataclass(frozen=True)
class Trace:
    """A recorded file, ``speed`` times as fast; its lengths too, divided by ``shrink``, unless
    others are asked for."""

    kind: ClassVar[str] = "trace"
    path: str
    speed: float = 1.0
    shrink: float = 1.0

    def __post_init__(self) -> None:
        positive(speed=self.speed, shrink=self.shrink)

    def rows(self, rng: np.random.Generator) -> Iterator[Row]:
        for row in read_trace(Path(self.path)):
            yield replace(shrunk(row, self.shrink), time=row.time / self.speed)


@dataclass(frozen=True)
class Synthetic:
    """Like a published trace, at its own rate or at ``rate``; lengths divided by ``shrink``."""

    kind: ClassVar[str] = "synthetic"
    like: Known
    rate: float | None = None
    shrink: float = 1.0

    def __post_init__(self) -> None:
        positive(rate=self.rate, shrink=self.shrink)

    def rows(self, rng: np.random.Generator) -> Iterator[Row]:
        published = PUBLISHED[self.like]
        for row in synthetic(replace(published, rate=self.rate or published.rate), rng):
            yield shrunk(row, self.shrink)


@dataclass(frozen=True)
class Closed:
    """A closed loop: ``concurrency`` users who ask again ``think`` seconds after an answer. They
    come one after the other in the first ``ramp`` seconds."""

    kind: ClassVar[str] = "closed"
    concurrency: int
    think: float = 0.0
    ramp: float = 0.0

    def __post_init__(self) -> None:
        positive(concurrency=self.concurrency)
        not_negative(think=self.think, ramp=self.ramp)

    def rows(self, rng: np.random.Generator) -> Iterator[Row]:
        """Without times: an answer decides when the next is sent."""
        while True:
            yield UNKNOWN


Arrivals = Constant | Poisson | Gamma | OnOff | Ramp | AtOnce | Trace | Synthetic | Closed


def _poisson(rng: np.random.Generator, time: Callable[[float], float]) -> Iterator[Row]:
    """A Poisson process of any rate: one of rate 1, its times mapped by the inverse of the
    expected count."""
    area = 0.0
    while True:
        area += rng.exponential()
        yield replace(UNKNOWN, time=time(area))

"""Settings side by side on the running pipeline: a model is some 15 % off, a trial is not.

All take turns, so that what else the machine does falls on each of them, and shares are those of
one turn. Who falls far behind takes no further turn, which bounds the time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from deltaserve.pipeline.tuning.settings import Settings

TURNS = 3
CLEARLY = 1.03
BEHIND = 0.75


@dataclass(frozen=True)
class Tried:
    """rate: elements a second, median over turns. share: of the first one's rate, median over
    turns. finished: it took all turns."""

    settings: Settings
    rate: float
    share: float
    finished: bool = True


def side_by_side(settings: Sequence[Settings], rate_of: Callable[[Settings], float]) -> list[Tried]:
    """At most three turns of each; the first one is what others are compared with, and takes
    part as long as any other does."""
    rates: list[list[float]] = [[] for _ in settings]
    running = list(range(len(settings)))
    turns = 0
    while turns < TURNS and (len(running) > 1 or not turns):
        # None is always measured first.
        for each in running[:: -1 if turns % 2 else 1]:
            rates[each].append(rate_of(settings[each]))
        turns += 1
        best = max(rates[each][-1] for each in running)
        running = [each for each in running if not each or rates[each][-1] >= BEHIND * best]
    found = []
    for each, measured in enumerate(rates):
        share = statistics.median(a / b for a, b in zip(measured, rates[0], strict=False))
        found.append(Tried(settings[each], statistics.median(measured), share, each in running))
    return found


def fastest(tried: Sequence[Tried]) -> Tried:
    """The first, unless another is clearly faster."""
    best = max((each for each in tried if each.finished), key=lambda each: each.share)
    return best if best.share > CLEARLY else tried[0]

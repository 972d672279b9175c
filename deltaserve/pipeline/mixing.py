"""In which order a mix takes rows from its parts.

Rows are taken in blocks. In the first n blocks together each part has its share of rows to
within one, and within a block the order is a seeded permutation; so both the long-run
proportions and the local ones are right, and the part at any position is known without the
positions before it.
"""

from __future__ import annotations

import math
import sys
from bisect import bisect_right
from collections.abc import Sequence

import numpy as np

SMALLEST_BLOCK = 256
# So that no part's number of rows in a block can round to less than none.
ROWS_OF_RAREST = 4
LARGEST_BLOCK = 1 << 20
KEPT_BLOCKS = 4
# The size of a part that is repeated for ever.
ENDLESS = sys.maxsize


class Schedule:
    """The parts in turn, while none of them has ended.

    weights: of each part, zero for one that has ended. phase: how many have ended; another
    order is drawn for each.
    """

    def __init__(self, weights: Sequence[float], seed: int, phase: int) -> None:
        shares = np.asarray(weights, float) / sum(weights)
        rarest = min(share for share in shares if share > 0)
        self._block = int(
            min(LARGEST_BLOCK, max(SMALLEST_BLOCK, math.ceil(ROWS_OF_RAREST / rarest)))
        )
        self._edges = np.concatenate([[0.0], np.cumsum(shares)])
        self._edges[-1] = 1.0
        self._seed, self._phase = seed, phase
        # The last few blocks; threads may draw one twice, which does no harm.
        self._drawn: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def part(self, position: int) -> tuple[int, int]:
        """The part that gives the row at ``position``, and how many it gave before."""
        block, at = divmod(position, self._block)
        parts, ranks = self._order(block)
        return int(parts[at]), int(ranks[at])

    def given(self, position: int) -> np.ndarray:
        """How many rows each part gives before ``position``; int64 [parts]."""
        block, at = divmod(position, self._block)
        parts, _ = self._order(block)
        return self._before(block) + np.bincount(parts[:at], minlength=len(self._edges) - 1)

    def end(self, sizes: Sequence[int]) -> int:
        """The first position whose part has no row left, if each part has ``sizes`` rows."""
        low, high = 0, 1
        size = np.asarray(sizes, float)
        while not (self._before(high) > size).any():
            low, high = high, high * 2
        while high - low > 1:
            middle = (low + high) // 2
            if (self._before(middle) > size).any():
                high = middle
            else:
                low = middle
        parts, ranks = self._order(low)
        over = ranks >= size[parts]
        assert over.any()
        return low * self._block + int(np.argmax(over))

    def _order(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        drawn = self._drawn.get(block)
        if drawn is None:
            drawn = self._draw(block)
            if len(self._drawn) >= KEPT_BLOCKS:
                self._drawn = {}
            self._drawn[block] = drawn
        return drawn

    def _before(self, block: int) -> np.ndarray:
        cuts = np.floor(self._edges * (block * self._block) + 0.5).astype(np.int64)
        return np.diff(cuts)

    def _draw(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        first = self._before(block)
        counts = self._before(block + 1) - first
        parts = np.repeat(np.arange(len(counts)), counts)
        words = np.array([self._seed & 0xFFFFFFFF, self._phase, block & 0xFFFFFFFF, block >> 32])
        parts = np.random.Generator(np.random.PCG64(words)).permutation(parts)
        ranks = np.empty(len(parts), np.int64)
        for part in range(len(counts)):
            mine = parts == part
            ranks[mine] = first[part] + np.arange(counts[part])
        return parts, ranks


class Phases:
    """The whole order of parts with known sizes; a new phase begins where one ends.

    ``map[position]`` is (part, row of the part): what Grain calls a selection map.
    """

    def __init__(
        self, weights: Sequence[float], sizes: Sequence[int], seed: int, stop: str
    ) -> None:
        left, alive = np.array(sizes, dtype=object), np.array(weights, float)
        alive[[size == 0 for size in sizes]] = 0
        self._starts: list[int] = [0]
        self._schedules: list[tuple[Schedule, np.ndarray]] = []
        taken = np.zeros(len(sizes), dtype=object)
        if stop == "first" and not alive.all():
            return
        while alive.any():
            schedule = Schedule(alive.tolist(), seed, len(self._schedules))
            self._schedules.append((schedule, taken.copy()))
            if all(size >= ENDLESS for size, weight in zip(left, alive, strict=True) if weight):
                self._starts.append(ENDLESS)
                break
            bound = [int(size) if weight else 0 for size, weight in zip(left, alive, strict=True)]
            end = schedule.end(bound)
            self._starts.append(self._starts[-1] + end)
            if stop == "first":
                break
            given = schedule.given(end)
            taken = taken + given
            left = np.array(
                [n if n >= ENDLESS else n - g for n, g in zip(left, given, strict=True)], object
            )
            alive[[size <= 0 for size in left]] = 0

    def __len__(self) -> int:
        return self._starts[-1]

    def __getitem__(self, position: int) -> tuple[int, int]:
        phase = int(np.searchsorted(self._starts, position, side="right")) - 1
        schedule, taken = self._schedules[phase]
        part, rank = schedule.part(position - self._starts[phase])
        return part, int(taken[part]) + rank


class Turns:
    """``block`` rows of each part in turn, until all have ended; a selection map like Phases."""

    def __init__(self, sizes: Sequence[int], block: int) -> None:
        left, taken = list(sizes), [0] * len(sizes)
        # Of each stretch: its first position, the parts, their rows a round, those taken before.
        self._stretches: list[tuple[int, list[int], list[int], list[int]]] = []
        self._length = 0
        while alive := [part for part, size in enumerate(left) if size > 0]:
            rounds = min(left[part] for part in alive) // block
            counts = [min(block, left[part]) for part in alive]
            self._stretches.append((self._length, alive, counts, list(taken)))
            # A last round in which some part gives less than a block is a stretch of its own.
            rounds = max(1, rounds)
            for part, count in zip(alive, counts, strict=True):
                taken[part] += rounds * count
                left[part] -= rounds * count
            self._length += rounds * sum(counts)
            if self._length >= ENDLESS:
                break

    def __len__(self) -> int:
        return min(self._length, ENDLESS)

    def __getitem__(self, position: int) -> tuple[int, int]:
        at = bisect_right(self._stretches, position, key=lambda stretch: stretch[0]) - 1
        start, parts, counts, taken = self._stretches[at]
        turn, within = divmod(position - start, sum(counts))
        for part, count in zip(parts, counts, strict=True):
            if within < count:
                return part, taken[part] + turn * count + within
            within -= count
        raise AssertionError("a position lies within a round")

"""Coordinated rounds: n consumers get batches of near-equal cost in the same round.

A synchronous step takes as long as its most expensive batch. So rows of a look-ahead window are
sorted by cost, cut into rounds of neighbours, and each round is dealt out to the consumers; the
order of the rounds is drawn anew, so that costs do not follow a pattern. For padded batches cost
rises with the length, and rounds are length buckets in the limit of narrow ones (tf.data
service's coordinated reads); for packed rows, where every row has as many tokens, what differs
is the attention, hence the squares.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

Batch = Any


@dataclass(frozen=True)
class Cost:
    """Of a row, in any unit: token * (tokens) + square * (sum over its sequences of length^2).
    The quotient square / token says how many tokens of linear work one pair of tokens costs; for
    causal attention about 1 / (12 * d_model)."""

    token: float = 1.0
    square: float = 0.0

    def of(self, lengths: Sequence[int]) -> float:
        """lengths: of the sequences in a row."""
        array = np.asarray(lengths, float)
        return float(self.token * array.sum() + self.square * (array**2).sum())

    @classmethod
    def fit(cls, lengths: Sequence[Sequence[int]], seconds: Sequence[float]) -> Cost:
        """From measured step times of rows (least squares, neither factor negative).

        Raises:
            ValueError: fewer than two rows.
        """
        if len(lengths) < 2 or len(lengths) != len(seconds):
            raise ValueError("a cost is fitted to two or more rows and as many times")
        tokens = np.array([np.sum(row) for row in lengths], float)
        squares = np.array([np.sum(np.asarray(row, float) ** 2) for row in lengths])
        times = np.asarray(seconds, float)
        (token, square), *_ = np.linalg.lstsq(np.stack([tokens, squares], 1), times, rcond=None)
        if token < 0:
            return cls(0.0, float(squares @ times / (squares @ squares)))
        if square < 0:
            return cls(float(tokens @ times / (tokens @ tokens)), 0.0)
        return cls(float(token), float(square))


@dataclass(frozen=True)
class Arrangement:
    """consumers: of each round. batch: rows of each consumer. look_ahead: rounds that are
    arranged together."""

    consumers: int
    batch: int
    look_ahead: int = 64
    seed: int = 0


class Rounds:
    """rows: an iterator with get_state and set_state. cost: of a row. collate: a batch of rows.

    Elements are lists, a batch for each consumer. At the end of the rows the last round is
    smaller; rows that are not enough for one each are left out and counted in ``left_out``.
    State: that of ``rows`` before the window, which window it is, and the rounds given of it.
    """

    def __init__(
        self,
        rows: Any,
        arrangement: Arrangement,
        cost: Callable[[Any], float],
        collate: Callable[[list[Any]], Batch],
        producer: int = 0,
    ) -> None:
        self._rows, self._cost, self._collate = rows, cost, collate
        self._arrangement, self._producer = arrangement, producer
        self._window = -1
        self._given = 0
        self._before = rows.get_state()
        self._rounds: list[list[list[Any]]] = []
        self.left_out = 0

    def __iter__(self) -> Rounds:
        return self

    def __next__(self) -> list[Batch]:
        if self._given == len(self._rounds):
            self._fill(self._window + 1)
        if not self._rounds:
            raise StopIteration
        self._given += 1
        return [self._collate(rows) for rows in self._rounds[self._given - 1]]

    def get_state(self) -> dict[str, Any]:
        return {"rows": self._before, "window": self._window, "given": self._given}

    def set_state(self, state: dict[str, Any]) -> None:
        self._rows.set_state(state["rows"])
        self._before, self._rounds, self._given, self._window = state["rows"], [], 0, -1
        if state["window"] >= 0:
            self._fill(state["window"])
            self._given = state["given"]

    def _fill(self, window: int) -> None:
        before, plan = self._rows.get_state(), self._arrangement
        rows = list(itertools.islice(self._rows, plan.look_ahead * plan.consumers * plan.batch))
        self.left_out = len(rows) % plan.consumers
        rows = rows[: len(rows) - self.left_out]
        if not rows and self._window >= 0:
            self._rounds, self._given = [], 0
            self._before, self._window = before, window
            return
        costs = [self._cost(row) for row in rows]
        key = [plan.seed & (2**64 - 1), (self._producer << 40) + window]
        order = arrange(costs, plan, np.random.Generator(np.random.Philox(key=key)))
        self._rounds = [[[rows[at] for at in batch] for batch in each] for each in order]
        self._before, self._window, self._given = before, window, 0


def arrange(
    costs: Sequence[float], arrangement: Arrangement, rng: np.random.Generator
) -> list[list[list[int]]]:
    """Rounds of a window: for each, and for each consumer, the rows (by number) of its batch.
    The number of rows must be a multiple of the number of consumers."""
    consumers = arrangement.consumers
    assert len(costs) % consumers == 0
    # Rows of equal cost in a drawn order, or the source's order would decide.
    tie = rng.permutation(len(costs))
    order = np.lexsort((tie, np.asarray(costs, float)))
    size = consumers * arrangement.batch
    rounds = [
        _deal(order[at : at + size], costs, consumers, rng) for at in range(0, len(order), size)
    ]
    return [rounds[at] for at in rng.permutation(len(rounds))]


def _deal(
    rows: np.ndarray, costs: Sequence[float], consumers: int, rng: np.random.Generator
) -> list[list[int]]:
    """As many rows for each consumer, of near-equal sums: the dearest row goes to the batch
    that is cheapest so far. Which consumer gets which batch is drawn."""
    batches: list[list[int]] = [[] for _ in range(consumers)]
    sums = np.zeros(consumers)
    most = len(rows) // consumers
    for row in rows[::-1]:
        open_ = [at for at in range(consumers) if len(batches[at]) < most]
        cheapest = min(open_, key=lambda at: sums[at])
        batches[cheapest].append(int(row))
        sums[cheapest] += costs[row]
    return [batches[at] for at in rng.permutation(consumers)]

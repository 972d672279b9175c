"""Operators that need rows in order, as streams with exact states.

A state never holds rows. Where an operator holds rows back it gives the state of what is below
it before those rows, and how many of them are out; restoring computes the rest again.
"""

from __future__ import annotations

import logging
from abc import abstractmethod
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import numpy as np

from deltaserve.errors import PipelineError
from deltaserve.pipeline.adapter import CHUNK, Executor, Segment
from deltaserve.pipeline.elements import Element
from deltaserve.pipeline.rows import Row
from deltaserve.pipeline.segments import Done, Probe

logger = logging.getLogger(__name__)
State = dict[str, Any]


class Stream(Protocol):
    """``next`` raises StopIteration at the end; states are of plain values (JSON)."""

    def next(self) -> Row: ...

    def get_state(self) -> State: ...

    def set_state(self, state: State) -> None: ...

    def close(self) -> None: ...


class SegmentStream:
    """The rows of a segment, computed by an executor. told: notes that are not told again."""

    def __init__(
        self, segment: Segment, executor: Executor, probe: Probe | None, told: set[str]
    ) -> None:
        self.segment, self._executor, self._probe, self._told = segment, executor, probe, told
        self._results: Iterator[Done] | None = None
        self._rows: list[Row] = []
        self._list, self._taken = -1, 0  # the list that is being given out
        self._skipped, self._some = 0, False

    @property
    def skipped(self) -> int:
        """Broken rows that were passed over so far."""
        return self._skipped

    def next(self) -> Row:
        while self._taken >= len(self._rows):
            self._advance()
        self._taken += 1
        self._some = True
        return self._rows[self._taken - 1]

    def get_state(self) -> State:
        return {"list": self._list, "taken": self._taken, "of": CHUNK, "some": self._some,
                "skipped": self._skipped}  # fmt: skip

    def set_state(self, state: State) -> None:
        if state["of"] != CHUNK:
            raise PipelineError(f"this state counts lists of {state['of']} rows, not of {CHUNK}")
        self._stop()
        self._rows, self._list, self._taken = [], state["list"], 0
        self._skipped, self._some = state["skipped"], state["some"]
        if state["taken"]:
            # The list was counted already.
            self._list -= 1
            before = self._skipped
            self._advance()
            self._skipped, self._taken = before, state["taken"]

    def close(self) -> None:
        self._stop()
        self.segment.work.close()

    def _advance(self) -> None:
        self._require_some()
        if self._results is None:
            self._results = self._executor.open(self.segment, self._list + 1)
        done = next(self._results, None)
        if done is None:
            raise StopIteration
        if self._probe and done.measured is not None:
            self._probe.merge(done.measured)
        for note in done.notes:
            if note not in self._told:
                self._told.add(note)
                logger.warning("%s", note)
        self._list, self._rows, self._taken = self._list + 1, done.rows, 0
        self._skipped += done.skipped

    def _stop(self) -> None:
        close = getattr(self._results, "close", None)
        if close is not None:
            close()
        self._results = None

    def _require_some(self) -> None:
        """Nothing at all from a whole pass is a mistake, and with repeats would never end."""
        least = min(self.segment.pass_length, self.segment.length)
        if self._some or (self._list + 1) * CHUNK < least:
            return
        from deltaserve.pipeline.segments import leaves_of

        leaves = leaves_of(self.segment.work.root)
        of = ", ".join(dict.fromkeys(leaf.source.name for leaf in leaves))
        if not self.segment.length:
            raise PipelineError(f"{of}: no rows: the source is empty, or nothing is taken of it")
        drops = dict.fromkeys(
            node.name for leaf in leaves for node in leaf.elements if node.op != "cache"
        )
        why = f" ({self._skipped} rows were broken and skipped)" if self._skipped else ""
        raise PipelineError(
            f"{of}: not one of {least} rows passed {', '.join(drops) or 'reading'}{why}"
        )


class ElementStream:
    """Row by row, in the consumer: element operators above streams."""

    def __init__(self, child: Stream, element: Element) -> None:
        self._child, self._element = child, element
        self._rows: list[Row] = []
        self._given = 0
        self._before: State | None = None

    def next(self) -> Row:
        while self._given >= len(self._rows):
            before = self._child.get_state()
            self._rows, self._given = self._element([self._child.next()]), 0
            self._before = before
        self._given += 1
        return self._rows[self._given - 1]

    def get_state(self) -> State:
        if self._given >= len(self._rows):
            return {"child": self._child.get_state(), "given": 0}
        return {"child": self._before, "given": self._given}

    def set_state(self, state: State) -> None:
        self._child.set_state(state["child"])
        self._rows, self._given = [], 0
        if state["given"]:
            self.next()
            self._given = state["given"]

    def close(self) -> None:
        self._child.close()


class Windowed:
    """Takes a window of rows, gives out others made of them."""

    def __init__(self, child: Stream) -> None:
        self._child = child
        self._held: list[Row] = []
        self._given = 0
        self._before: State | None = None
        # How many windows went before: a source of repeatable randomness.
        self._number = -1

    @abstractmethod
    def _window(self) -> list[Row]:
        """The rows of the next window; none at the end."""

    def next(self) -> Row:
        if self._given >= len(self._held):
            self._refill()
        self._given += 1
        return self._held[self._given - 1]

    def get_state(self) -> State:
        if self._given >= len(self._held):
            return {"child": self._child.get_state(), "given": 0, "window": self._number}
        return {"child": self._before, "given": self._given, "window": self._number - 1}

    def set_state(self, state: State) -> None:
        self._child.set_state(state["child"])
        self._held, self._given, self._number = [], 0, state["window"]
        if state["given"]:
            self._refill()
            self._given = state["given"]

    def close(self) -> None:
        self._child.close()

    def _refill(self) -> None:
        before = self._child.get_state()
        self._number += 1
        held = self._window()
        if not held:
            self._number -= 1
            raise StopIteration
        self._held, self._given, self._before = held, 0, before

    def _take(self, enough: Callable[[list[Row]], bool]) -> list[Row]:
        rows: list[Row] = []
        while not enough(rows):
            try:
                rows.append(self._child.next())
            except StopIteration:
                break
        return rows


class WindowShuffle(Windowed):
    """Each window of rows in a new order."""

    def __init__(self, child: Stream, seed: int, window: int, epoch: int) -> None:
        super().__init__(child)
        self._seed, self._size, self._epoch = seed, window, epoch

    def _window(self) -> list[Row]:
        rows = self._take(lambda taken: len(taken) >= self._size)
        words = [self._seed & 0xFFFFFFFF, self._epoch, self._number]
        order = np.random.Generator(np.random.PCG64(words)).permutation(len(rows))
        return [rows[at] for at in order]


class Take:
    """The first ``n`` rows."""

    def __init__(self, child: Stream, n: int) -> None:
        self._child, self._n, self._given = child, n, 0

    def next(self) -> Row:
        if self._given >= self._n:
            raise StopIteration
        row = self._child.next()
        self._given += 1
        return row

    def get_state(self) -> State:
        return {"child": self._child.get_state(), "given": self._given}

    def set_state(self, state: State) -> None:
        self._child.set_state(state["child"])
        self._given = state["given"]

    def close(self) -> None:
        self._child.close()


class Repeat:
    """Passes over what ``build`` makes for each epoch."""

    def __init__(self, build: Callable[[int], Stream], epochs: int | None) -> None:
        self._build, self._epochs = build, epochs
        self._epoch, self._child = 0, build(0)
        self._some = False

    def next(self) -> Row:
        while True:
            try:
                row = self._child.next()
            except StopIteration:
                if self._epoch + 1 == self._epochs:
                    raise
                if not self._some:
                    raise PipelineError("repeat: what is repeated gives no rows") from None
                self._begin(self._epoch + 1)
            else:
                self._some = True
                return row

    def get_state(self) -> State:
        return {"epoch": self._epoch, "child": self._child.get_state(), "some": self._some}

    def set_state(self, state: State) -> None:
        if state["epoch"] != self._epoch:
            self._begin(state["epoch"])
        self._child.set_state(state["child"])
        self._some = state["some"]

    def close(self) -> None:
        self._child.close()

    def _begin(self, epoch: int) -> None:
        self._child.close()
        self._epoch, self._child = epoch, self._build(epoch)

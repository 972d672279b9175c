"""Streams that take from several, one row at a time, where lengths are not known beforehand."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from deltaserve.pipeline.mixing import Schedule
from deltaserve.pipeline.rows import Row
from deltaserve.pipeline.streams import State, Stream


class Parts:
    """Several streams; which one gives the next row is ``_choose``'s to say."""

    def __init__(self, children: Sequence[Stream]) -> None:
        self._children = list(children)
        self._alive = [True] * len(children)

    @abstractmethod
    def _choose(self) -> int:
        """The part that is next; asked again when it has ended."""

    @abstractmethod
    def _given_by(self, part: int) -> None:
        """A row of it is out."""

    def _ended(self, part: int) -> None:
        self._alive[part] = False

    def next(self) -> Row:
        while any(self._alive):
            part = self._choose()
            try:
                row = self._children[part].next()
            except StopIteration:
                self._ended(part)
                continue
            self._given_by(part)
            return row
        raise StopIteration

    def get_state(self) -> State:
        children = [child.get_state() for child in self._children]
        return {"children": children, "alive": list(self._alive)}

    def set_state(self, state: State) -> None:
        for child, each in zip(self._children, state["children"], strict=True):
            child.set_state(each)
        self._alive = list(state["alive"])

    def close(self) -> None:
        for child in self._children:
            child.close()


class Mix(Parts):
    """By weight, of streams whose lengths are not known before they end."""

    def __init__(
        self, children: Sequence[Stream], weights: Sequence[float], seed: int, stop: str
    ) -> None:
        super().__init__(children)
        self._weights, self._seed, self._stop = weights, seed, stop
        self._begin(0, 0)

    def _choose(self) -> int:
        return self._schedule.part(self._position)[0]

    def _given_by(self, part: int) -> None:
        self._position += 1

    def _ended(self, part: int) -> None:
        self._alive[part] = False
        if self._stop == "first":
            self._alive = [False] * len(self._alive)
        self._begin(self._phase + 1, 0)

    def _begin(self, phase: int, position: int) -> None:
        self._phase, self._position = phase, position
        if any(self._alive):
            pairs = zip(self._weights, self._alive, strict=True)
            weights = [weight if alive else 0.0 for weight, alive in pairs]
            self._schedule = Schedule(weights, self._seed, phase)

    def get_state(self) -> State:
        return super().get_state() | {"phase": self._phase, "position": self._position}

    def set_state(self, state: State) -> None:
        super().set_state(state)
        self._begin(state["phase"], state["position"])


class Interleave(Parts):
    """``block`` rows of each in turn."""

    def __init__(self, children: Sequence[Stream], block: int) -> None:
        super().__init__(children)
        self._block, self._turn, self._out = block, 0, 0

    def _choose(self) -> int:
        if self._out >= self._block:
            self._turn, self._out = self._turn + 1, 0
        while not self._alive[self._turn % len(self._alive)]:
            self._turn, self._out = self._turn + 1, 0
        return self._turn % len(self._alive)

    def _given_by(self, part: int) -> None:
        self._out += 1

    def get_state(self) -> State:
        return super().get_state() | {"turn": self._turn % len(self._alive), "out": self._out}

    def set_state(self, state: State) -> None:
        super().set_state(state)
        self._turn, self._out = state["turn"], state["out"]

"""One stream for several consumers: made once, kept while somebody may still want it.

window: a sliding window of the last elements; a consumer that fell behind it jumps to its start
(the elements it skips are counted). Nobody waits for a slow one. lockstep: an element is kept
until all consumers have had it, and the fastest waits when it is ``limit`` ahead of the slowest;
nobody skips.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from deltaserve.errors import ServiceError

# Elements that are made before the fastest consumer asks for them.
AHEAD = 8


@dataclass(frozen=True)
class Chunk:
    """Elements ``first``, first + 1, ...; none if they are not there yet. shared: what
    ``Link.share`` made of them, instead of ``items``. waits_for: consumers that hold up the
    stream."""

    first: int
    items: Sequence[Any] = ()
    shared: Any = None
    ended: bool = False
    waits_for: Sequence[int] = ()


@dataclass(frozen=True)
class Limits:
    """mode: window or lockstep. elements: of the window, or of the lead. bytes: of either."""

    mode: str
    consumers: int
    elements: int
    bytes: int
    ahead: int = AHEAD


@dataclass
class _Buffer:
    first: int
    items: deque[Any] = field(default_factory=deque)
    sizes: deque[int] = field(default_factory=deque)
    bytes: int = 0

    @property
    def end(self) -> int:
        return self.first + len(self.items)

    def append(self, item: Any, size: int) -> None:
        self.items.append(item)
        self.sizes.append(size)
        self.bytes += size

    def drop(self) -> None:
        self.items.popleft()
        self.bytes -= self.sizes.popleft()
        self.first += 1


class SharedStream:
    """open_at: an iterator of (element, bytes) that begins with element number n. A thread makes
    the elements until ``close``."""

    def __init__(
        self, limits: Limits, start: int, open_at: Callable[[int], Iterator[tuple[Any, int]]]
    ) -> None:
        self._limits = limits
        self._open_at = open_at
        self._lock = threading.Lock()
        self._maker, self._readers = (
            threading.Condition(self._lock),
            threading.Condition(self._lock),
        )
        # Of the consumers that wait: the end that they wait for. They are woken when it is there,
        # not at every element, which with many consumers would cost more than the elements.
        self._needs: dict[int, int] = {}
        self._buffer = _Buffer(start)
        self._at = dict.fromkeys(range(limits.consumers), start)
        self._rewound = True
        self._finished = self._closed = False
        self._error: Exception | None = None
        self.made = 0
        self.used = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="shared stream", daemon=True)
        self._thread.start()

    def read(self, consumer: int, index: int, count: int, wait_s: float) -> Chunk:
        """``count`` elements from ``index`` on; waits for them. Fewer: the stream ends, or there
        is no room for more. The consumer has had all before ``index``.

        Raises what the stream raised.
        """
        limit = time.monotonic() + wait_s
        count = min(count, self._limits.elements)
        with self._lock:
            self.used = time.monotonic()
            self._at[consumer] = index
            if index < self._buffer.first and self._limits.mode == "lockstep":
                self._rewind(index)
            self._drop()
            self._maker.notify()
            while not self._readable(index, count):
                left = limit - time.monotonic()
                if left <= 0 and index < self._buffer.end:
                    break
                if left <= 0:
                    return Chunk(index, waits_for=self._slowest())
                self._needs[consumer] = index + count
                self._readers.wait(left)
            self._needs.pop(consumer, None)
            return self._chunk(index, count)

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._maker.notify()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # ---- with the lock held

    def _chunk(self, index: int, count: int) -> Chunk:
        first = max(index, self._buffer.first)
        offset = first - self._buffer.first
        items = [self._buffer.items[at] for at in range(offset, len(self._buffer.items))[:count]]
        if not items and self._error is not None:
            raise self._take_error()
        return Chunk(first, items, ended=self._finished and not items)

    def _take_error(self) -> Exception:
        error = self._error
        assert error is not None
        if isinstance(error, ServiceError):  # the dispatcher was away; the next one asks again
            self._error, self._rewound = None, True
        return error

    def _readable(self, index: int, count: int) -> bool:
        end = self._buffer.end
        if end >= index + count or self._finished or self._error is not None:
            return True
        return index < end and not self._room()

    def _rewind(self, index: int) -> None:
        """A consumer returned with an older checkpoint: make everything from there on again. The
        others wait."""
        self._buffer = _Buffer(index)
        self._rewound, self._finished, self._error = True, False, None

    def _drop(self) -> None:
        buffer, limits = self._buffer, self._limits
        if limits.mode == "lockstep":
            slowest = min(self._at.values())
            while buffer.items and buffer.first < slowest:
                buffer.drop()
            return
        while len(buffer.items) > limits.elements or (
            buffer.bytes > limits.bytes and len(buffer.items) > 1
        ):
            buffer.drop()

    def _room(self) -> bool:
        buffer, limits = self._buffer, self._limits
        if buffer.end - max(self._at.values()) >= limits.ahead:
            return False
        if limits.mode == "window":
            return True
        # An element bigger than all the room still passes, alone.
        full = buffer.bytes >= limits.bytes and bool(buffer.items)
        return not full and buffer.end - min(self._at.values()) < limits.elements

    def _slowest(self) -> list[int]:
        """Those for whom the stream waits: none while it is being made."""
        if self._limits.mode == "window" or self._room():
            return []
        slowest = min(self._at.values())
        return [consumer for consumer, at in self._at.items() if at == slowest]

    # ---- the thread that makes the elements

    def _run(self) -> None:
        iterator: Iterator[tuple[Any, int]] = iter(())
        while True:
            with self._lock:
                while not self._closed and not self._rewound and not self._wanted():
                    self._maker.wait()
                if self._closed:
                    return
                buffer, rewound = self._buffer, self._rewound
                self._rewound = False
            try:
                if rewound:
                    iterator = self._open_at(buffer.end)
                item, size = next(iterator)
            except StopIteration:
                self._end(buffer, None)
            except Exception as error:  # goes to the consumers, whatever it is
                self._end(buffer, error)
            else:
                self._add(buffer, item, size)

    def _wanted(self) -> bool:
        return self._room() and not self._finished and self._error is None

    def _add(self, buffer: _Buffer, item: Any, size: int) -> None:
        with self._lock:
            if buffer is not self._buffer:
                return  # it was rewound meanwhile
            buffer.append(item, size)
            self.made += 1
            self._drop()
            end = self._buffer.end
            if not self._room() or any(need <= end for need in self._needs.values()):
                self._readers.notify_all()

    def _end(self, buffer: _Buffer, error: Exception | None) -> None:
        with self._lock:
            if buffer is not self._buffer:
                return
            self._finished, self._error = error is None, error
            self._readers.notify_all()

"""A worker: prepares ranges of the source, and hosts streams that several consumers share.

It keeps nothing that cannot be made again: a range is prepared whole or not at all, and a hosted
stream is remade from its last mark.
"""

from __future__ import annotations

import contextlib
import pickle
import threading
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from deltaserve.errors import ServiceError
from deltaserve.pipeline.segments import Done
from deltaserve.pipeline.service.ledger import JobSpec
from deltaserve.pipeline.service.link import Link, WorkerLost
from deltaserve.pipeline.service.program import HostedOptions, Lists, hosted_elements
from deltaserve.pipeline.service.shared import Chunk, Limits, SharedStream

MARK_EVERY_S = 1.0
# Programs whose files and tokenizers stay open.
OPEN_PROGRAMS = 8
# Chunks of shared streams that stay ready to be sent.
SENT = 16
# A stream that nobody read for so long is closed.
IDLE_S = 300.0


class Worker:
    """What a worker does; see Link for who calls it."""

    def __init__(self, name: str, link: Link, beat_s: float = 1.0) -> None:
        self.name, self._beat_s = name, beat_s
        self._link = link
        self._sent: OrderedDict[tuple[int, int, int, int], Any] = OrderedDict()
        self._open: OrderedDict[str, Lists] = OrderedDict()
        self._streams: dict[tuple[str, int], tuple[int, SharedStream]] = {}
        self._rates: dict[str, float] = {}
        # One core: whatever is prepared, is prepared one after the other.
        self._core = threading.Lock()
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    # ---- life

    def beat_until_stopped(self) -> None:
        """Tell the dispatcher again and again that this worker lives; for a thread of its own."""
        while not self._stopped.is_set():
            # A dispatcher that is being restarted will hear the next one.
            with contextlib.suppress(ServiceError):
                self._link.ask("beat", self.name, self._link.node, dict(self._rates), patience_s=0)
            self._close_idle()
            self._stopped.wait(self._beat_s)

    def stop(self) -> None:
        self._stopped.set()
        for _, stream in self._streams.values():
            stream.close()

    # ---- splits

    def prepare(
        self, job: str, reference: tuple[str, Any], place: tuple[int, int], start: int, stop: int
    ) -> list[Done]:
        """Lists [start, stop) of a segment."""
        with self._core:
            began = time.perf_counter()
            done = self._lists(reference).run(place, start, stop)
            self._measure(job, stop - start, time.perf_counter() - began)
        return done

    # ---- hosted streams

    def read(
        self,
        spec: JobSpec,
        reference: tuple[str, Any] | None,
        place: tuple[int, int],
        consumer: int,
        index: int,
        count: int,
        wait_s: float,
    ) -> Chunk:
        """Elements of a producer from ``index`` on, pickled. place: the producer, and the epoch
        under which this worker hosts it. reference: of the program, to begin with.

        Raises:
            WorkerLost: it hosts it no more.
        """
        stream = self._stream(spec, reference, place, index)
        chunk = stream.read(consumer, index, count, wait_s)
        if spec.mode == "rounds":
            return replace(chunk, items=[item[consumer] for item in chunk.items])
        return replace(chunk, items=[], shared=self._shared(place, chunk) if chunk.items else None)

    def _shared(self, place: tuple[int, int], chunk: Chunk) -> Any:
        """The items, sent once for all consumers that read the same."""
        key = (*place, chunk.first, len(chunk.items))
        with self._lock:
            if key not in self._sent:
                self._sent[key] = self._link.share(list(chunk.items))
                if len(self._sent) > SENT:
                    self._sent.popitem(last=False)
            return self._sent[key]

    def _stream(
        self, spec: JobSpec, reference: tuple[str, Any] | None, place: tuple[int, int], index: int
    ) -> SharedStream:
        producer, epoch = place
        key = (spec.name, producer)
        with self._lock:
            found = self._streams.get(key)
            if found is not None and found[0] == epoch:
                return found[1]
            if found is not None and found[0] > epoch:
                raise WorkerLost(f"{self.name} hosts {key} under a later epoch")
            if reference is None:
                raise WorkerLost(f"{self.name} closed {key}, which nobody read")
            options = HostedOptions.parse(spec.options)
            mode = "window" if spec.mode == "window" else "lockstep"
            limits = Limits(mode, spec.consumers, options.elements, options.bytes)

            def open_at(first: int) -> Iterator[tuple[Any, int]]:
                return self._elements(spec, reference, producer, first)

            stream = SharedStream(limits, index, open_at)
            self._streams[key] = (epoch, stream)
        if found is not None:
            found[1].close()
        return stream

    def _elements(
        self, spec: JobSpec, reference: tuple[str, Any], producer: int, first: int
    ) -> Iterator[tuple[Any, int]]:
        """Pickled elements from number ``first`` on, with their sizes."""
        elements = hosted_elements(self._link.open(reference[1]), spec, producer)
        marks = self._link.ask("marks", spec.name, producer)
        before = [mark for mark in marks if mark[0] <= first]
        at, state = before[-1] if before else (0, None)
        if state is not None:
            elements.set_state(state)
        marked = time.monotonic()
        while True:
            if at > first and time.monotonic() - marked > MARK_EVERY_S:
                self._mark(spec.name, producer, at, elements)
                marked = time.monotonic()
            with self._core:
                began = time.perf_counter()
                element = next(elements, None)
                if element is None:
                    return
                if at >= first:
                    packed = _pack(element, spec)
                self._measure(spec.name, 1, time.perf_counter() - began)
            if at >= first:
                yield packed
            at += 1

    def _mark(self, job: str, producer: int, index: int, elements: Any) -> None:
        # Without it, another host has more to make again.
        with contextlib.suppress(ServiceError):
            self._link.ask("mark", job, producer, index, elements.get_state(), patience_s=0)

    # ---- inside

    def _lists(self, reference: tuple[str, Any]) -> Lists:
        """Of a program; called by whoever has the core."""
        stream, shared = reference
        if stream not in self._open:
            self._open[stream] = Lists(self._link.open(shared))
            if len(self._open) > OPEN_PROGRAMS:
                self._open.popitem(last=False)
        self._open.move_to_end(stream)
        return self._open[stream]

    def _measure(self, job: str, done: int, seconds: float) -> None:
        rate = done / max(seconds, 1e-9)
        old = self._rates.get(job)
        # The mean of times, not of rates: a short one must not count for more.
        self._rates[job] = rate if old is None else 1 / (0.8 / old + 0.2 / rate)

    def _close_idle(self) -> None:
        limit = time.monotonic() - IDLE_S
        with self._lock:
            idle = [key for key, (_, stream) in self._streams.items() if stream.used < limit]
            streams = [self._streams.pop(key)[1] for key in idle]
        for stream in streams:
            stream.close()


def _pack(element: Any, spec: JobSpec) -> tuple[Any, int]:
    """Pickled once, however many consumers there are. It travels between processes of one
    service, and is never stored."""
    if spec.mode == "rounds":
        parts = [_pickled(part) for part in element]
        return parts, sum(part.nbytes for part in parts)
    whole = _pickled(element)
    return whole, whole.nbytes


def _pickled(value: Any) -> np.ndarray:
    # Bytes would be copied into every reply's own pickle; an array goes beside it.
    return np.frombuffer(pickle.dumps(value, protocol=5), np.uint8)

"""Deltas without files: how long a load takes is computed, what residency decides is real."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

from deltaserve.artifact.reader import Delta
from deltaserve.bench.simulate.system import GB, System
from deltaserve.bench.simulate.virtual import StepClock
from deltaserve.engine.loader import THREADS, Done, Job
from deltaserve.engine.operands import Image, Needs, Operands
from deltaserve.engine.probe import Savings
from deltaserve.engine.versions import DeltaVersion, State

VOCAB = 1 << 30
"""Prompts and answers are made of ids below it: no two answers are alike."""


@dataclass(frozen=True)
class Weightless:
    """What residency asks of ``Operands``."""

    num_bytes: int

    def attach(self, slot: int) -> Iterator[None]:
        return iter(())

    def detach(self, slot: int) -> None: ...

    def bytes_shared_with(self, tensors: Iterable[Any]) -> int:
        return 0


class Store:
    """The source, maker and gauge of ``Parts``."""

    copies = False

    def __init__(self, system: System) -> None:
        deltas = system.deltas
        size = deltas.bytes_of(deltas.device_gb)
        step = deltas.bytes_of(deltas.step_gb)
        self.needs_of_all = Needs(size, step, 0, deltas.bytes_of(deltas.disk_gb), VOCAB)

    def version(self, name: str) -> DeltaVersion:
        return DeltaVersion(name, 1, name, name, self.needs_of_all)

    def base(self, name: str) -> DeltaVersion:
        needs = Needs(0, 0, 0, 0, VOCAB)
        return DeltaVersion(name, 1, "", name, needs, state=State.READY, pinned=True, slot=0)

    def open(self, path: str) -> Delta:
        raise AssertionError("deltas are not opened in a simulation")

    def read(self, version: DeltaVersion) -> Delta:
        """An image that has nothing but its size."""
        image = SimpleNamespace(tensors=[SimpleNamespace(nbytes=version.needs.image_bytes)])
        return cast(Delta, image)

    def needs(self, delta: Delta) -> Needs:
        return self.needs_of_all

    def stage(self, delta: Delta) -> Image:
        return delta

    def ready(self, image: Image) -> None:
        """A simulated device has its own memory."""

    def make(self, image: Image) -> Operands:
        return cast(Operands, Weightless(self.needs_of_all.device_bytes))

    def copy(self, operands: Operands) -> Operands:
        raise AssertionError("host memory keeps what was read, in a simulation")

    def merge(self, delta: Delta) -> Operands:
        raise AssertionError("nothing is merged in a simulation")

    def savings(self, operands: Operands) -> Savings:
        raise AssertionError("nothing is merged in a simulation")


class SimulatedLoader:
    """The ``Background`` of residency. Reads share one disk, one after the other; copies to the
    device take place beside each other, as many as the loader has threads."""

    def __init__(self, system: System, clock: StepClock) -> None:
        self._clock = clock
        self._disk = system.device.disk_gbs * GB
        self._link = system.device.link_gbs * GB * system.device.count
        self._prepare = system.deltas.prepare_s
        self._disk_free = 0.0
        self._pending: list[tuple[float, float, Job, Callable[[], object]]] = []
        self.instant = False
        """Before the start of a run: what is loaded then costs nothing."""

    @property
    def idle(self) -> bool:
        return not self._pending

    @property
    def full(self) -> bool:
        return len(self._pending) >= THREADS

    def submit(self, job: Job, work: Callable[[], object]) -> None:
        now = self._clock()
        end = now if self.instant else self._end_of(job, now)
        self._pending.append((end, end - now, job, work))

    def collect(self) -> list[Done]:
        now = self._clock()
        ended = sorted((e for e in self._pending if e[0] <= now), key=lambda entry: entry[0])
        self._pending = [entry for entry in self._pending if entry[0] > now]
        return [Done(job, work(), None, seconds) for _, seconds, job, work in ended]

    def wait(self, seconds: float | None = None) -> None:
        """Lets time pass until the next job ends, at most so long."""
        now = self._clock()
        ends = min((end for end, *_ in self._pending), default=now + (seconds or 0.0))
        until = ends if seconds is None else min(ends, now + seconds)
        self._clock.pass_time(max(0.0, until - now))

    def close(self) -> None: ...

    def _end_of(self, job: Job, now: float) -> float:
        needs = job.version.needs
        end = now
        if job.version.image is None:
            self._disk_free = end = max(now, self._disk_free) + needs.image_bytes / self._disk
        if job.kind == "load":
            end += needs.device_bytes / self._link + self._prepare
        return end

"""Residency without files, layers and threads: what loads, ends when the test says so."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from deltaserve.engine.limits import Limits
from deltaserve.engine.loader import Done, Job
from deltaserve.engine.operands import Needs
from deltaserve.engine.parts import Parts
from deltaserve.engine.probe import Savings
from deltaserve.engine.residency import Residency
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import EngineRequest, SamplingParams
from deltaserve.engine.versions import DeltaVersion, State
from deltaserve.errors import ArtifactError

BASE = "base"


@dataclass(eq=False)
class FakeDelta:
    """As big as its path says: ``anything/SIZE``."""

    path: Path

    @property
    def manifest(self) -> Any:
        return SimpleNamespace(digest=f"digest of {self.path}")

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [torch.empty(int(self.path.name), dtype=torch.uint8)]


@dataclass(eq=False)
class FakeOperands:
    """Knows where it is attached. layers: slot -> who is attached there."""

    size: int
    layers: dict[int, FakeOperands]
    pieces: int = 3

    @property
    def num_bytes(self) -> int:
        return self.size

    def attach(self, slot: int) -> Iterator[None]:
        for _ in range(self.pieces):
            assert self.layers.setdefault(slot, self) is self, "two deltas in one slot"
            yield

    def detach(self, slot: int) -> None:
        self.layers.pop(slot, None)

    def detach_merged(self, slot: int) -> None:
        self.layers.pop(slot, None)

    @cached_property
    def tensors(self) -> list[torch.Tensor]:
        return [torch.empty(self.size, dtype=torch.uint8)]

    def bytes_shared_with(self, tensors: list[torch.Tensor]) -> int:
        return self.size if tensors is self.tensors else 0


@dataclass(eq=False)
class FakeParts:
    """Source, maker and gauge in one. bad: paths that cannot be read. one_memory: operands of the
    host are those of the device, as on a CPU."""

    bad: set[str] = field(default_factory=set)
    one_memory: bool = False
    layers: dict[int, FakeOperands] = field(default_factory=dict)

    def open(self, path: str) -> Any:
        return FakeDelta(Path(path))

    def read(self, version: DeltaVersion) -> Any:
        if version.path in self.bad:
            raise ArtifactError(f"{version.path} is damaged")
        return FakeDelta(Path(version.path))

    def needs(self, delta: Any) -> Needs:
        size = int(delta.path.name)
        return Needs(size, size, 4 * size, size, 100)

    @property
    def copies(self) -> bool:
        return False

    def copy(self, operands: Any) -> Any:
        raise AssertionError("operands are not copied here")

    def stage(self, delta: Any) -> Any:
        return self.make(delta) if self.one_memory else delta

    def ready(self, image: Any) -> Any:
        return image if isinstance(image, FakeOperands) else None

    def make(self, delta: Any) -> Any:
        return self.ready(delta) or FakeOperands(int(delta.path.name), self.layers)

    def merge(self, delta: Any) -> Any:
        return FakeOperands(4 * int(delta.path.name), {})

    def savings(self, operands: Any) -> Savings:
        return Savings((1, 8), (0.001, 0.008))


class ManualLoader:
    """Jobs wait until ``finish``: then they run, and can be collected."""

    def __init__(self) -> None:
        self.jobs: list[tuple[Job, Callable[[], object]]] = []
        self.results: list[Done] = []

    @property
    def idle(self) -> bool:
        return not self.jobs and not self.results

    @property
    def full(self) -> bool:
        return len(self.jobs) + len(self.results) >= 2

    def submit(self, job: Job, work: Callable[[], object]) -> None:
        self.jobs.append((job, work))

    def finish(self, index: int = 0) -> None:
        if self.jobs:
            job, work = self.jobs.pop(index % len(self.jobs))
            try:
                self.results.append(Done(job, work(), None, 0.01))
            except ArtifactError as error:
                self.results.append(Done(job, None, str(error), 0.01))

    def collect(self) -> list[Done]:
        results, self.results = self.results, []
        return results

    def wait(self, seconds: float | None = None) -> None:
        self.finish()

    def close(self) -> None: ...


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@dataclass(eq=False)
class Bench:
    """A residency and a crude scheduler: first come, first served, ``max_running`` at a time."""

    limits: Limits
    max_running: int = 4
    clock: Clock = field(default_factory=Clock)
    parts: FakeParts = field(default_factory=FakeParts)
    loader: ManualLoader = field(default_factory=ManualLoader)
    waiting: list[Sequence] = field(default_factory=list)
    running: list[Sequence] = field(default_factory=list)
    ended: dict[str, str | None] = field(default_factory=dict)
    number: int = 0

    def __post_init__(self) -> None:
        base = DeltaVersion(
            BASE, 1, "", "base", Needs(0, 0, 0, 0, 100), state=State.READY, pinned=True, slot=0
        )
        parts = Parts(self.parts, self.parts, self.parts, self.loader, base)
        self.residency = Residency(parts, self.limits, self.clock)

    def request(self, name: str) -> Sequence | None:
        version = self.residency.current(name)
        self.number += 1
        if version.error is not None:
            self.ended[f"r{self.number}"] = version.error
            return None
        request = EngineRequest(f"r{self.number}", name, (1,), SamplingParams(max_tokens=1))
        seq = Sequence(request, 0, 0, version=version)
        self.residency.bind(request.request_id, version)
        self.waiting.append(seq)
        return seq

    def step(self) -> None:
        """Loads move, then whoever can runs."""
        for version in self.residency.advance():
            for name in self.residency.requests_of(version):
                self.end(next(s for s in self.waiting if s.request.request_id == name))
        for seq in list(self.waiting):
            if len(self.running) < self.max_running and self.residency.acquire(seq):
                self.waiting.remove(seq)
                self.running.append(seq)

    def preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self.residency.release(seq)
        self.waiting.insert(0, seq)

    def end(self, seq: Sequence) -> None:
        if seq in self.running:
            self.running.remove(seq)
            self.residency.release(seq)
        else:
            self.waiting.remove(seq)
        assert seq.version is not None
        self.residency.ended(seq.request.request_id)
        self.ended[seq.request.request_id] = seq.version.error

    def check(self) -> None:
        """What must hold between any two steps."""
        residency, limits = self.residency, self.limits
        device, catalogue = residency.device, residency.catalogue
        versions = list(catalogue.versions())
        assert len(set(versions)) == len(versions)
        assert device.used_bytes == sum(v.reserved for v in versions) <= limits.device_bytes
        assert residency.host.used_bytes <= limits.host_bytes
        assert residency.merger.used_bytes <= limits.merge_bytes
        for version in versions:
            assert version.references == sum(s.version is version for s in self.running)
            mine = [s for s in (*self.running, *self.waiting) if s.version is version]
            assert version.bound == len(mine)
            if version.attached:
                assert version.reserved == version.operands.num_bytes  # type: ignore[union-attr]
                assert self.parts.layers[version.slot] is version.operands
            if version.state in (State.REGISTERED, State.ERROR):
                assert version.slot is None
                assert version.reserved == 0
                assert version.merged is None
            assert version.state is not State.GONE
        loading = [v for v in versions if v.state is State.LOADING]
        attached = {v.slot for v in versions if v.attached} | {v.slot for v in loading}
        assert set(self.parts.layers) <= attached
        for seq in self.running:
            assert seq.version is not None
            assert seq.version.attached
            assert seq.slot == seq.version.slot
        for served in catalogue.served.values():
            assert not served.current.retired

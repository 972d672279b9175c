"""Which deltas are in memory, and who must give way: the DeltaStore of the scheduler.

All methods run on the engine's thread, between two steps, and none of them waits or reads files:
``advance`` collects what background threads have loaded, attaches it to the layers piece by
piece, and asks for the next. A delta waits for device memory in the order in which the scheduler
asks for it; one that waits longer than ``starvation_s`` goes first and may have others drained.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Protocol

from deltaserve.artifact.reader import Delta
from deltaserve.engine.eviction import GreedyDual
from deltaserve.engine.hosttier import HostTier
from deltaserve.engine.limits import Limits
from deltaserve.engine.loader import Done
from deltaserve.engine.merging import Merger
from deltaserve.engine.operands import Needs, Operands
from deltaserve.engine.probe import Savings
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.types import ResidencyStats
from deltaserve.engine.versions import Catalogue, DeltaVersion, State
from deltaserve.errors import ConfigError


class Source(Protocol):
    """Where artifacts come from. ``read`` runs in a background thread."""

    def open(self, path: str) -> Delta: ...

    def read(self, version: DeltaVersion) -> Delta: ...


class Maker(Protocol):
    """What becomes of them. ``make`` runs in a background thread."""

    def needs(self, delta: Delta) -> Needs: ...

    def make(self, delta: Delta) -> Operands: ...

    def merge(self, delta: Delta) -> Operands: ...


class Gauge(Protocol):
    """What merging would save. Runs in a background thread, after ``make``."""

    def savings(self, operands: Operands) -> Savings: ...


class Background(Protocol):
    """Threads for jobs, see ``Loader``."""

    @property
    def idle(self) -> bool: ...

    @property
    def full(self) -> bool: ...

    def submit(self, job: object, work: Callable[[], object]) -> None: ...

    def collect(self) -> list[Done]: ...

    def wait(self, seconds: float | None = None) -> None: ...

    def close(self) -> None: ...


@dataclass(slots=True)
class Counts:
    """Since the start. hits, misses: requests that found their delta on the device, or not."""

    loads: int = 0
    load_seconds: float = 0.0
    evictions: int = 0
    failures: int = 0
    hits: int = 0
    misses: int = 0


@dataclass(frozen=True, slots=True)
class Job:
    """``load`` ends with operands, ``stage`` with the bytes in host memory, ``merge`` with dense
    projections."""

    kind: str
    version: DeltaVersion


@dataclass(eq=False)
class Residency:
    """Moves versions between disk, host and device. clock: seconds, for tests to set."""

    source: Source
    maker: Maker
    gauge: Gauge
    loader: Background
    limits: Limits
    base: DeltaVersion
    clock: Callable[[], float] = time.monotonic
    catalogue: Catalogue = field(default_factory=Catalogue)
    counts: Counts = field(default_factory=Counts)
    used_bytes: int = 0
    """Of the device: reserved from the start of a load to the eviction."""

    def __post_init__(self) -> None:
        self.host = HostTier(self.limits.host_bytes)
        self.by_slot = {0: self.base}
        self.vocab_sizes = {0: self.base.needs.vocab_size}
        self.merger = Merger(self.limits.merge_bytes, self.clock())
        self._worth = GreedyDual()
        self._requests: dict[str, DeltaVersion] = {}
        self._demand: dict[DeltaVersion, None] = {}
        self._asked: dict[DeltaVersion, None] = {}
        self._attaching: deque[tuple[DeltaVersion, Iterator[None]]] = deque()

    # What the operator does.

    def register(self, name: str, path: str, *, pinned: bool = False, load: bool = True) -> int:
        """A new name, or a new version of a served one, which takes over when it is READY.

        Returns the version's number.

        A new version of a pinned name is pinned as well. load: without waiting for a request.
        Raises ArtifactError, BaseMismatchError; ConfigError when it cannot fit.
        """
        delta = self.source.open(path)
        manifest, needs = delta.manifest, self.maker.needs(delta)
        number = self.catalogue.next_number(name)
        version = DeltaVersion(name, number, str(delta.path), manifest.digest, needs, manifest)
        served = self.catalogue.served.get(name)
        pinned = pinned or (served is not None and served.pinned)
        self._check_room([version], {version} if pinned else set())
        self.catalogue.add(version, pinned=pinned)
        if load:
            self._wish(version)
        self._sweep()
        return number

    def unregister(self, name: str) -> None:
        """Refuse new requests; memory is freed when those that came before have ended.

        Raises UnknownModelError.
        """
        self.catalogue.remove(name)
        self._sweep()

    def pin(self, name: str, pinned: bool) -> None:
        """Raises UnknownModelError; ConfigError when too little memory would be left to others."""
        version = self.catalogue.get(name).current
        if pinned:
            self._check_room([], {version})
            self._wish(version)
        self.catalogue.pin(name, pinned)

    def rollback(self, name: str) -> None:
        """Back to the version before, as soon as it is READY; or give up one that is on its way.

        Raises UnknownModelError; ConfigError when there is none.
        """
        served = self.catalogue.rollback(name)
        self._wish(served.candidate or served.current)
        self._sweep()

    # What a request does.

    def current(self, name: str) -> DeltaVersion:
        """The version that a new request gets. Raises UnknownModelError. Thread-safe."""
        return self.base if name == self.base.name else self.catalogue.get(name).current

    def bind(self, request_id: str, version: DeltaVersion) -> None:
        """A request came; it stays with this version until ``ended``."""
        assert request_id not in self._requests, f"{request_id} was bound twice"
        self._requests[request_id] = version
        version.bound += 1
        version.last_used = self.clock()
        self._worth.touch(version)
        if version.attached:
            self.counts.hits += 1
        else:
            self.counts.misses += 1
            self._want(version)

    def ended(self, request_id: str) -> None:
        """The request has ended, whatever the reason. Unknown ids are ignored."""
        version = self._requests.pop(request_id, None)
        if version is not None:
            version.bound -= 1
            assert version.bound >= version.references, f"{version.name} is used by nobody"

    def requests_of(self, version: DeltaVersion) -> list[str]:
        return [name for name, bound in self._requests.items() if bound is version]

    def acquire(self, seq: Sequence) -> bool:
        """See ``DeltaStore``."""
        version = seq.version
        assert version is not None, "the sequence was not bound"
        if version.state is not State.READY:
            self._want(version)
            self._asked[version] = None
            return False
        assert version.slot is not None
        version.references += 1
        seq.slot = version.slot
        return True

    def release(self, seq: Sequence) -> None:
        """See ``DeltaStore``."""
        assert seq.version is not None
        assert seq.version.references > 0, f"{seq.version.name} was released twice"
        seq.version.references -= 1

    def step_bytes(self, slot: int) -> int:
        """See ``DeltaStore``."""
        version = self.by_slot[slot]
        return version.needs.step_bytes if version.merged is None else version.needs.merged_bytes

    def count_rows(self, rows_of_slot: Mapping[int, int]) -> None:
        """A step has run with so many rows of each slot."""
        for slot, rows in rows_of_slot.items():
            self.merger.count(self.by_slot[slot], rows)

    # What happens between two steps.

    def advance(self) -> list[DeltaVersion]:
        """One turn -> the versions that could not be loaded and whose requests must end."""
        self._merge_best()
        if self.idle:
            return []
        failed = [done.job.version for done in self.loader.collect() if not self._take(done)]
        failed += self._attach()
        self._sweep()
        self._start_loads()
        return failed

    @property
    def idle(self) -> bool:
        """Nothing is loading, wanted or leaving: ``advance`` would change nothing."""
        return not (self._demand or self._attaching or self.catalogue.left) and self.loader.idle

    def load_all(self) -> list[DeltaVersion]:
        """Load and merge in order of registration what fits, now -> those that failed.

        For the start, when nothing is known of the demand.
        """
        room = self.limits.device_bytes
        for served in self.catalogue.served.values():
            room -= served.current.needs.device_bytes
            if room < 0:
                break
            self._wish(served.current)
        failed = self._run_to_end()
        for version in self.merger.first(s.current for s in self.catalogue.served.values()):
            self._merge(version)
            self._run_to_end()
        return failed

    def _run_to_end(self) -> list[DeltaVersion]:
        failed = []
        while not self.idle:
            failed += self.advance()
            if not self.loader.idle:
                self.loader.wait()
        return failed

    def wait(self, seconds: float) -> None:
        """Until a load has ended, at most so long; not at all when there is nothing to do."""
        if not self.idle:
            self.loader.wait(seconds)

    def stats(self) -> ResidencyStats:
        on_device = len(self.by_slot) - 1
        total = sum(len(s.versions()) for s in self.catalogue.served.values())
        return ResidencyStats(
            device_deltas=on_device,
            device_bytes=self.used_bytes,
            device_limit=self.limits.device_bytes,
            merged_deltas=len(self.merger),
            merged_bytes=self.merger.used_bytes,
            merged_limit=self.limits.merge_bytes,
            host_deltas=len(self.host),
            host_bytes=self.host.used_bytes,
            host_limit=self.limits.host_bytes,
            registered=total,
            loads=self.counts.loads,
            load_seconds=self.counts.load_seconds,
            evictions=self.counts.evictions,
            failures=self.counts.failures,
            hits=self.counts.hits,
            misses=self.counts.misses,
        )

    def dump(self) -> dict[str, Any]:
        """Every version, for people who debug."""
        now = self.clock()
        return {
            "versions": [_describe(v, now) for v in self.catalogue.versions()],
            "wanted": [f"{v.name}@{v.number}" for v in self._in_order(now)],
        }

    # Loading.

    def _take(self, done: Done) -> bool:
        """A job ended. False if its version failed."""
        version = done.job.version
        if done.job.kind == "merge":
            self._take_merged(version, done)
            return True
        self.host.end_staging(version)
        if done.error is not None:
            self._fail(version, done.error)
            return False
        if done.job.kind == "stage":
            version.state = State.REGISTERED
            self.host.keep(version, done.result)
            return True
        image, version.operands, savings = done.result
        self.merger.add(version, savings)
        version.load_seconds = done.seconds
        self.counts.load_seconds += done.seconds
        self._reserve(version, version.operands.num_bytes)
        self.host.keep(version, image)
        version.slot = next(slot for slot in count(1) if slot not in self.by_slot)
        self.by_slot[version.slot] = version
        self._attach_soon(version, version.operands)
        return True

    def _attach(self) -> list[DeltaVersion]:
        """Give loaded operands to the layers, as far as the time between two steps allows."""
        end = time.perf_counter() + self.limits.attach_s
        failed = []
        while self._attaching and time.perf_counter() < end:
            version, rest = self._attaching[0]
            try:
                if any(time.perf_counter() > end for _ in rest):
                    break
            except Exception as error:  # a delta that no layer takes must not end the engine
                self._fail(version, f"it could not be attached: {type(error).__name__}: {error}")
                failed.append(version)
                continue
            self._attaching.popleft()
            if version.state is State.LOADING:
                self._set_ready(version)
        return failed

    def _set_ready(self, version: DeltaVersion) -> None:
        assert version.slot is not None
        version.state, version.ready_at = State.READY, self.clock()
        self.vocab_sizes[version.slot] = version.needs.vocab_size
        self.counts.loads += 1
        self._demand.pop(version, None)
        version.wished, version.asked = False, None
        served = self.catalogue.served.get(version.name)
        if served is not None and served.candidate is version:
            self.catalogue.promote(served)
        self.catalogue.revision += 1

    def _fail(self, version: DeltaVersion, error: str) -> None:
        self._leave_device(version)
        self.host.drop(version)
        self._demand.pop(version, None)
        version.state, version.error = State.ERROR, error
        version.wished, version.asked = False, None
        self.counts.failures += 1
        self.catalogue.fail(version)

    def _start_loads(self) -> None:
        """Ask for the wanted versions in their order, as far as memory and threads allow."""
        now = self.clock()
        for version in self._in_order(now):
            if version.state is not State.REGISTERED:
                continue
            if self.loader.full:
                break
            starved = self._starved(version, now)
            if self._make_room(version, starved, now):
                self._load(version)
            elif starved:
                # Nobody may take the room that it waits for.
                self._drain_for(version, now)
                break
            else:
                self._stage(version)
        self._asked.clear()
        if not any(v.state is State.REGISTERED and self._starved(v, now) for v in self._demand):
            self._stop_draining()

    def _load(self, version: DeltaVersion) -> None:
        version.state = State.LOADING
        self._reserve(version, version.needs.device_bytes)

        def work() -> tuple[Delta, Operands, Savings]:
            image = version.image or self.source.read(version)
            operands = self.maker.make(image)
            return image, operands, self.gauge.savings(operands)

        self.loader.submit(Job("load", version), work)
        self.catalogue.revision += 1

    def _stage(self, version: DeltaVersion) -> None:
        """The device is full: at least read the files, if host memory has room."""
        if version.image is None and self.host.start_staging(version):
            version.state = State.LOADING
            self.loader.submit(Job("stage", version), lambda: self.source.read(version))
            self.catalogue.revision += 1

    # Merging.

    def _merge_best(self) -> None:
        version, victims = self.merger.choose(self.clock())
        if version is not None and version.state is State.READY:
            for victim in victims:
                assert victim.merged is not None
                assert victim.operands is not None
                self._attach_soon(victim, victim.operands.replaced_by(victim.merged))
                self.merger.undo(victim)
            self._merge(version)

    def _merge(self, version: DeltaVersion) -> None:
        self.merger.start(version)
        work = lambda: self.maker.merge(version.image or self.source.read(version))  # noqa: E731
        self.loader.submit(Job("merge", version), work)

    def _take_merged(self, version: DeltaVersion, done: Done) -> None:
        """What cannot be merged stays packed."""
        if self.merger.done(version, done.result, done.seconds):
            self._attach_soon(version, done.result)
            self.catalogue.revision += 1

    def _attach_soon(self, version: DeltaVersion, operands: Operands) -> None:
        assert version.slot is not None
        self._attaching.append((version, operands.attach(version.slot)))

    # Room on the device.

    def _make_room(self, version: DeltaVersion, starved: bool, now: float) -> bool:
        """Evict until it fits. False, and nothing is evicted, if that does not help."""
        missing = version.needs.device_bytes - (self.limits.device_bytes - self.used_bytes)
        chosen = []
        for victim in self._victims(starved, now):
            if missing <= 0:
                break
            chosen.append(victim)
            missing -= victim.reserved
        if missing > 0:
            return False
        for victim in chosen:
            self._evict(victim)
        return True

    def _victims(self, starved: bool, now: float) -> list[DeltaVersion]:
        """Who may be evicted, the cheapest first: nobody's, then superseded ones.

        Those for which requests wait only for the sake of one that starved.
        """
        found = [
            version
            for version in self._settled(now)
            if version.references == 0 and (starved or version.waiting == 0)
        ]
        return sorted(found, key=lambda v: (v.waiting > 0, self._is_current(v), v.priority))

    def _settled(self, now: float) -> list[DeltaVersion]:
        """On the device, not pinned, and long enough to have been of use."""
        return [
            version
            for version in self.by_slot.values()
            if version.attached
            and not version.pinned
            and version is not self.base
            and now - version.ready_at >= self.limits.min_residency_s
        ]

    def _drain_for(self, version: DeltaVersion, now: float) -> None:
        """Let running requests of others end and admit no more of them, longest resident first."""
        free = self.limits.device_bytes - self.used_bytes
        missing = version.needs.device_bytes - free
        settled = sorted(self._settled(now), key=lambda v: v.ready_at)
        leaving = [v for v in settled if v.references == 0 or v.state is State.DRAINING]
        missing -= sum(v.reserved for v in leaving)
        for victim in settled:
            if missing <= 0:
                break
            if victim not in leaving:
                victim.state = State.DRAINING
                missing -= victim.reserved

    def _stop_draining(self) -> None:
        """Nobody starves any more."""
        for version in self.by_slot.values():
            if version.state is State.DRAINING:
                version.state = State.READY
                self._demand.pop(version, None)
                version.asked = None

    def _evict(self, version: DeltaVersion) -> None:
        self._leave_device(version)
        version.state = State.REGISTERED
        self._worth.evicted(version)
        self.counts.evictions += 1
        self.catalogue.revision += 1
        self.host.settle(version)
        if version.waiting:
            self._want(version)

    def _leave_device(self, version: DeltaVersion) -> None:
        self._attaching = deque(item for item in self._attaching if item[0] is not version)
        self.merger.drop(version)
        if version.slot is not None:
            assert version.operands is not None
            version.operands.detach(version.slot)
            del self.by_slot[version.slot]
            self.vocab_sizes.pop(version.slot, None)
        version.slot = version.operands = None
        self._reserve(version, 0)

    def _reserve(self, version: DeltaVersion, size: int) -> None:
        self.used_bytes += size - version.reserved
        version.reserved = size

    def _check_room(self, more: list[DeltaVersion], pinned: set[DeltaVersion]) -> None:
        """Beside all that is pinned, each of the others must still fit. Raises ConfigError."""
        versions = [*self.catalogue.versions(), *more]
        pinned = pinned | {v for v in versions if v.pinned or self._will_be_pinned(v)}
        fixed = sum(v.needs.device_bytes for v in pinned)
        largest = max(
            (v for v in versions if v not in pinned),
            key=lambda v: v.needs.device_bytes,
            default=None,
        )
        needed = fixed + (largest.needs.device_bytes if largest else 0)
        if needed > self.limits.device_bytes:
            subject = (more or list(pinned))[0].name
            others = f" and {largest.needs.device_bytes} for {largest.name!r}" if largest else ""
            raise ConfigError(
                f"{subject!r} does not fit: delta_memory_bytes is {self.limits.device_bytes}, but "
                f"{fixed} are needed for pinned deltas{others}; raise it, or pin fewer deltas"
            )

    # Order and demand.

    def _want(self, version: DeltaVersion) -> None:
        if version.asked is None:
            version.asked = self.clock()
        self._demand[version] = None

    def _wish(self, version: DeltaVersion) -> None:
        if not version.attached and version.state is not State.ERROR:
            version.wished = True
            self._want(version)

    def _in_order(self, now: float) -> list[DeltaVersion]:
        """Those that starve, then as the scheduler asked for them, then by age."""
        for version in list(self._demand):
            if not version.waiting and not version.wished:
                del self._demand[version]
                version.asked = None
        place = {version: n for n, version in enumerate(self._asked)}

        def key(version: DeltaVersion) -> tuple[bool, float, float]:
            asked = version.asked if version.asked is not None else now
            starved = self._starved(version, now)
            return not starved, 0 if starved else place.get(version, len(place)), asked

        return sorted(self._demand, key=key)

    def _starved(self, version: DeltaVersion, now: float) -> bool:
        return version.asked is not None and now - version.asked >= self.limits.starvation_s

    def _is_current(self, version: DeltaVersion) -> bool:
        served = self.catalogue.served.get(version.name)
        return served is not None and served.current is version

    def _will_be_pinned(self, version: DeltaVersion) -> bool:
        served = self.catalogue.served.get(version.name)
        return served is not None and served.candidate is version and served.pinned

    def _sweep(self) -> None:
        """Forget retired versions that no request needs; what loads is forgotten afterwards."""
        for version in list(self.catalogue.left):
            if version.bound == 0 and version.state is not State.LOADING:
                self._leave_device(version)
                self.host.drop(version)
                self._demand.pop(version, None)
                self.catalogue.forget(version)


def _describe(version: DeltaVersion, now: float) -> dict[str, Any]:
    return {
        "name": version.name,
        "version": version.number,
        "state": str(version.shown_state),
        "tier": str(version.tier),
        "pinned": version.pinned,
        "bound": version.bound,
        "running": version.references,
        "bytes": version.reserved,
        "slot": version.slot,
        "waits_s": None if version.asked is None else round(now - version.asked, 3),
        "error": version.error,
    }

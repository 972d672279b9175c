"""Which deltas are in memory, and who must give way: the DeltaStore of the scheduler.

All methods run on the engine's thread, between two steps, and none of them waits or reads files:
``advance`` collects what background threads have loaded, attaches it to the layers piece by
piece, and asks for the next. A delta waits for device memory in the order in which the scheduler
asks for it; one that waits longer than ``starvation_s`` goes first and may have others drained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from deltaserve.engine.demand import Demand
from deltaserve.engine.device import DeviceTier
from deltaserve.engine.eviction import GreedyDual
from deltaserve.engine.hosttier import HostTier
from deltaserve.engine.limits import Counts, Limits, require_room
from deltaserve.engine.loader import Done, Job
from deltaserve.engine.merging import Merger
from deltaserve.engine.operands import Operands
from deltaserve.engine.parts import Parts
from deltaserve.engine.preparing import Prepared, Preparer
from deltaserve.engine.sequence import Sequence
from deltaserve.engine.versions import Catalogue, DeltaVersion, State


class Residency:
    """Moves versions between disk, host and device. clock: seconds, for tests to set."""

    def __init__(
        self, parts: Parts, limits: Limits, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.source, self.maker, self.loader = parts.source, parts.maker, parts.loader
        self._preparer = Preparer(parts.source, parts.maker, parts.gauge)
        self.base = parts.base
        self.clock = clock
        self.catalogue = Catalogue()
        self.device = DeviceTier(limits, parts.base)
        self.host = HostTier(limits.host_bytes)
        self.merger = Merger(limits.merge_bytes, clock())
        self.demand = Demand(limits.starvation_s)
        self.counts = Counts()
        self._worth = GreedyDual()
        self._requests: dict[str, DeltaVersion] = {}

    # What the operator does.

    def register(self, name: str, path: str, *, pinned: bool = False, load: bool = True) -> int:
        """A new name, or a new version of a served one, which takes over when it is READY.

        Returns the version's number. A new version of a pinned name is pinned as well. load:
        without waiting for a request. Raises ArtifactError, BaseMismatchError; ConfigError when
        it cannot fit.
        """
        delta = self.source.open(path)
        manifest, needs = delta.manifest, self.maker.needs(delta)
        number = self.catalogue.next_number(name)
        version = DeltaVersion(name, number, str(delta.path), manifest.digest, needs, manifest)
        served = self.catalogue.served.get(name)
        pinned = pinned or (served is not None and served.pinned)
        self._require_room(version, {version} if pinned else set())
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
        served = self.catalogue.get(name)
        if pinned:
            successor = {served.candidate} if served.candidate else set()
            self._require_room(served.current, {served.current} | successor)
            self._wish(served.current)
        self.catalogue.pin(name, pinned)

    def rollback(self, name: str) -> None:
        """Back to the version before, as soon as it is READY; or give up one that is on its way.

        Raises UnknownModelError; ConfigError when there is none, or it is pinned and both versions
        do not fit.
        """
        served = self.catalogue.get(name)
        if served.previous is not None and served.candidate is None and served.pinned:
            self._require_room(served.previous, {served.previous})
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
        self._worth.touch(version)
        if version.attached:
            self.counts.hits += 1
        else:
            self.counts.misses += 1
            self.demand.want(version, self.clock())

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
            self.demand.ask(version, self.clock())
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
        # Also of a merged delta: the few rows that a decode step has of it run packed.
        return self.device.by_slot[slot].needs.step_bytes

    # What happens between two steps.

    @property
    def idle(self) -> bool:
        """Nothing is loading, wanted or leaving: ``advance`` would change nothing."""
        waiting = self.demand or self.device.attaching or self.catalogue.left
        return not waiting and self.loader.idle

    def advance(self) -> list[DeltaVersion]:
        """One turn -> the versions that could not be loaded and whose requests must end."""
        self._merge_best()
        if self.idle:
            return []
        failed = [done.job.version for done in self.loader.collect() if not self._take(done)]
        for version, error in self.device.attach():
            if error is not None:
                self._fail(version, error)
                failed.append(version)
            elif version.state is State.LOADING:
                self._set_ready(version)
        self._sweep()
        self._start_loads()
        return failed

    def wait(self, seconds: float) -> None:
        """Until a load has ended, at most so long; not at all when there is nothing to do."""
        if not self.idle and not self.device.attaching:
            self.loader.wait(seconds)

    def count_rows(self, rows_of_slot: Mapping[int, int]) -> None:
        """A step has run with so many rows of each slot."""
        for slot, rows in rows_of_slot.items():
            self.merger.count(self.device.by_slot[slot], rows)

    def load_all(self) -> list[DeltaVersion]:
        """Load and merge in order of registration what fits, now -> those that failed.

        For the start, when nothing is known of the demand.
        """
        room = self.device.free_bytes
        for served in self.catalogue.served.values():
            room -= served.current.needs.device_bytes
            if room < 0:
                break
            self._wish(served.current)
        failed = self._run_to_end()
        if self.device.limits.merge_at_start:
            for version in self.merger.first(s.current for s in self.catalogue.served.values()):
                self._merge(version)
                self._run_to_end()
        return failed

    def dump(self) -> dict[str, Any]:
        """Every version, and who waits for the device, for people who debug."""
        now = self.clock()
        return {
            "versions": [version.describe(now) for version in self.catalogue.versions()],
            "wanted": [f"{v.name} {v.number}" for v in self.demand.in_order(now)],
        }

    # Loading.

    def _start_loads(self) -> None:
        """Ask for the wanted versions in their order, as far as memory and threads allow."""
        now = self.clock()
        for version in self.demand.in_order(now):
            if version.state is not State.REGISTERED:
                continue
            starved = self.demand.starved(version, now)
            at_hand = self.maker.ready(version.image) if version.image else None
            if self.loader.full and not at_hand:
                if starved:  # those that need no thread would take what it waits for
                    break
                continue
            victims = self.device.room_for(version, self._victims(starved, now))
            if victims is not None:
                for victim in victims:
                    self._evict(victim)
                self._load(version, at_hand)
            elif starved:  # nobody may take the room that it waits for
                self.device.drain_for(version, now)
                break
            elif version.image is None and self.host.start_staging(version):
                self._submit("stage", version, self._preparer.stage)
        self.demand.next_plan()
        if not self.demand.any_starved(now):
            self._stop_draining()

    def _load(self, version: DeltaVersion, at_hand: Operands | None) -> None:
        self.device.reserve(version, version.needs.device_bytes)
        version.was_prepared = not at_hand
        if not at_hand:
            self._submit("load", version, self._preparer.load)
            return
        version.state = State.LOADING
        self.catalogue.revision += 1
        self._place(version, at_hand)

    def _submit(
        self, kind: str, version: DeltaVersion, work: Callable[[DeltaVersion, bool], Prepared]
    ) -> None:
        version.state = State.LOADING
        mergeable = self.merger.could_hold(version)
        self.loader.submit(Job(kind, version), partial(work, version, mergeable))
        self.catalogue.revision += 1

    def _take(self, done: Done) -> bool:
        """A job ended. False if its version failed."""
        version = done.job.version
        if done.job.kind == "merge":
            self._take_merged(version, done)
            return True
        if done.job.kind == "copy":
            self._take_copy(version, done)
            return True
        self.host.end_staging(version)
        if done.error is not None:
            self._fail(version, done.error)
            return False
        prepared: Prepared = done.result
        version.savings = prepared.savings
        if done.job.kind == "stage" or prepared.operands is None:
            version.state = State.REGISTERED
            self.host.keep(version, prepared.image)
            return True
        version.load_seconds = done.seconds
        self.counts.load_seconds += done.seconds
        version.image = prepared.image
        self._place(version, prepared.operands)
        return True

    def _place(self, version: DeltaVersion, operands: Operands) -> None:
        self.device.place(version, operands)
        self.host.settle(version)
        if version.savings is not None:
            self.merger.add(version, version.savings)

    def _set_ready(self, version: DeltaVersion) -> None:
        version.state, version.ready_at = State.READY, self.clock()
        self.counts.loads += 1
        self.demand.drop(version)
        served = self.catalogue.served.get(version.name)
        if served is not None and served.candidate is version:
            self.catalogue.promote(served)
        self.catalogue.revision += 1
        self._copy(version)

    def _copy(self, version: DeltaVersion) -> None:
        """Keep operands in host memory as they are on the device: the next load is a mere copy."""
        operands = version.operands
        if operands is None or not self.maker.copies or isinstance(version.image, Operands):
            return
        if version.image is not None or self.host.has_room(operands.num_bytes):
            self.loader.submit(Job("copy", version), lambda: (operands, self.maker.copy(operands)))

    def _take_copy(self, version: DeltaVersion, done: Done) -> None:
        """Unless it left the device meanwhile, where others may have its memory."""
        if done.error is None and version.operands is done.result[0]:
            self.host.drop(version)
            self.host.keep(version, done.result[1])

    def _fail(self, version: DeltaVersion, error: str) -> None:
        self._leave(version)
        self.host.drop(version)
        self.demand.drop(version)
        version.state, version.error = State.ERROR, error
        self.counts.failures += 1
        self.catalogue.fail(version)

    def _run_to_end(self) -> list[DeltaVersion]:
        failed = []
        while not self.idle:
            failed += self.advance()
            if not self.loader.idle:
                self.loader.wait()
        return failed

    # Leaving.

    def _victims(self, starved: bool, now: float) -> list[DeltaVersion]:
        """Who may be evicted, in order: superseded versions, then the cheapest.

        Those for which requests wait only for the sake of one that starved, and last.
        """
        found = [v for v in self.device.idle(now) if starved or v.waiting == 0]
        is_current = self.catalogue.is_current
        return sorted(found, key=lambda v: (v.waiting > 0, is_current(v), v.priority))

    def _evict(self, version: DeltaVersion) -> None:
        self._leave(version)
        version.state = State.REGISTERED
        self._worth.evicted(version)
        self.counts.evictions += 1
        self.catalogue.revision += 1
        self.host.settle(version)
        if version.waiting:
            self.demand.want(version, self.clock())

    def _stop_draining(self) -> None:
        """Nobody starves any more."""
        for version in self.device.draining():
            version.state = State.READY
            self.demand.drop(version)

    def _leave(self, version: DeltaVersion) -> None:
        self.merger.drop(version)
        self.device.leave(version)

    def _sweep(self) -> None:
        """Forget retired versions that no request needs; what loads is forgotten afterwards."""
        for version in list(self.catalogue.left):
            if version.bound == 0 and version.state is not State.LOADING:
                self._leave(version)
                self.host.drop(version)
                self.demand.drop(version)
                self.catalogue.forget(version)

    def _wish(self, version: DeltaVersion) -> None:
        if not version.attached and version.state is not State.ERROR:
            version.wished = True
            self.demand.want(version, self.clock())

    def _require_room(self, subject: DeltaVersion, pinned: set[DeltaVersion]) -> None:
        """As if ``pinned`` were so already. Raises ConfigError."""
        versions = {*self.catalogue.versions(), subject}
        pinned |= {v for v in versions if v.pinned or self.catalogue.will_be_pinned(v)}
        require_room(self.device.limits.device_bytes, subject, pinned, versions - pinned)

    # Merging.

    def _merge_best(self) -> None:
        version, victims = self.merger.choose(self.clock())
        if version is None or version.state is not State.READY:
            return
        for victim in victims:
            self.device.detach_merged(victim)
            self.merger.undo(victim)
        self._merge(version)

    def _merge(self, version: DeltaVersion) -> None:
        self.merger.start(version)
        self.loader.submit(Job("merge", version), partial(self._preparer.merge, version))

    def _take_merged(self, version: DeltaVersion, done: Done) -> None:
        """What cannot be merged stays packed."""
        if self.merger.done(version, done.result, done.worked):
            self.device.attach_soon(version, done.result)
            self.catalogue.revision += 1

"""The versions of the served deltas: what each is, where it is, and who uses it.

A request is bound to a version, not to a name: a name may get another version while the request
waits or runs, and the request still ends on its own. No torch here.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from deltaserve.errors import ConfigError, UnknownModelError

if TYPE_CHECKING:
    from deltaserve.artifact.manifest import Manifest
    from deltaserve.engine.operands import Image, Needs, Operands
    from deltaserve.engine.probe import Savings


class State(StrEnum):
    """READY and DRAINING are attached to the layers, the others are not.

    REGISTERED: loaded when a request needs it. DRAINING: its running requests go on, but it
    admits none: it gives its memory to one that has waited too long, and is REGISTERED again
    when they have ended. ERROR: it could not be loaded. GONE: forgotten.
    """

    REGISTERED = "registered"
    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    ERROR = "error"
    GONE = "gone"


class Tier(StrEnum):
    """Where the nearest copy is: operands on the device, packed bytes in host memory, or files."""

    DEVICE = "device"
    HOST = "host"
    DISK = "disk"


@dataclass(eq=False, slots=True)
class DeltaVersion:
    """One artifact under one name.

    bound: requests that came while it was current and have not ended. references: those of
    them that run. wished: to be loaded although no request waits, as a new version is.
    asked: since when somebody waits for it. ready_at: a time of the clock. was_prepared: its load
    was more than attaching what host memory had. reserved: bytes of the device that are its own,
    from the start of its loading on. frequency, priority: see ``eviction``. image: what host memory
    has of it. savings: what merging it saves, once it has been measured. merged: dense projections
    that took the place of some operands.
    """

    name: str
    number: int
    path: str
    digest: str
    needs: Needs
    manifest: Manifest | None = None
    state: State = State.REGISTERED
    error: str | None = None
    pinned: bool = False
    retired: bool = False
    bound: int = 0
    references: int = 0
    wished: bool = False
    asked: float | None = None
    slot: int | None = None
    ready_at: float = 0.0
    load_seconds: float = 0.0
    was_prepared: bool = True
    reserved: int = 0
    frequency: int = 0
    priority: float = 0.0
    image: Image | None = field(default=None, repr=False)
    savings: Savings | None = field(default=None, repr=False)
    operands: Operands | None = field(default=None, repr=False)
    merged: Operands | None = field(default=None, repr=False)

    @property
    def waiting(self) -> int:
        """Requests that cannot go on before it is on the device."""
        return self.bound - self.references

    @property
    def attached(self) -> bool:
        return self.state in (State.READY, State.DRAINING)

    @property
    def tier(self) -> Tier:
        if self.attached:
            return Tier.DEVICE
        return Tier.DISK if self.image is None else Tier.HOST

    def describe(self, now: float) -> dict[str, object]:
        """For people who debug."""
        return {
            "name": self.name,
            "version": self.number,
            "state": str(self.shown_state),
            "tier": str(self.tier),
            "pinned": self.pinned,
            "bound": self.bound,
            "running": self.references,
            "bytes": self.reserved,
            "slot": self.slot,
            "merged": self.merged is not None,
            "waits_s": None if self.asked is None else round(now - self.asked, 3),
            "error": self.error,
        }

    @property
    def shown_state(self) -> State:
        """As ``ModelInfo`` has it: what was unregistered is draining until it is gone; what
        others drain to make room is served as before."""
        if self.retired:
            return State.DRAINING
        return State.READY if self.state is State.DRAINING else self.state


@dataclass(eq=False, slots=True)
class Served:
    """A name. current: new requests get it. candidate: takes its place when it is READY.
    previous: what a rollback returns to. error: why the last candidate failed."""

    current: DeltaVersion
    candidate: DeltaVersion | None = None
    previous: DeltaVersion | None = None
    pinned: bool = False
    last_number: int = 1
    error: str | None = None

    def versions(self) -> list[DeltaVersion]:
        return [v for v in (self.current, self.candidate, self.previous) if v is not None]


class Catalogue:
    """Names and their versions. ``revision`` grows with each change that users can see.

    A version that no name needs any more is *retired*: it serves the requests that are bound to
    it, and ``left`` holds it until they have ended.
    """

    def __init__(self) -> None:
        self.served: dict[str, Served] = {}
        self.left: list[DeltaVersion] = []
        self.revision = 0

    def versions(self) -> Iterator[DeltaVersion]:
        """All that may still be in memory or come into it."""
        for served in self.served.values():
            yield from served.versions()
        yield from self.left

    @property
    def num_versions(self) -> int:
        return len(self.left) + sum(len(served.versions()) for served in self.served.values())

    def get(self, name: str) -> Served:
        """Raises UnknownModelError."""
        served = self.served.get(name)
        if served is None:
            raise UnknownModelError(
                f"the model {name!r} does not exist; GET /v1/models lists those that do",
                param="model",
            )
        return served

    def is_current(self, version: DeltaVersion) -> bool:
        served = self.served.get(version.name)
        return served is not None and served.current is version

    def will_be_pinned(self, version: DeltaVersion) -> bool:
        """A candidate of a pinned name."""
        served = self.served.get(version.name)
        return served is not None and served.candidate is version and served.pinned

    def next_number(self, name: str) -> int:
        served = self.served.get(name)
        return 1 if served is None else served.last_number + 1

    def add(self, version: DeltaVersion, *, pinned: bool) -> None:
        """A new name, or a candidate for a served one; one in ERROR is replaced at once."""
        self.revision += 1
        served = self.served.get(version.name)
        if served is None:
            version.pinned = pinned
            self.served[version.name] = Served(version, pinned=pinned)
            return
        served.last_number = version.number
        served.pinned, served.error = pinned, None
        if served.candidate is not None:
            self._retire(served.candidate)
        served.candidate = version
        if served.current.state is State.ERROR:
            self.promote(served)

    def promote(self, served: Served) -> None:
        """The candidate becomes current; what it replaces is kept for a rollback, if it can be."""
        assert served.candidate is not None, "nothing to promote"
        old, served.current = served.current, served.candidate
        served.candidate = None
        served.current.pinned, old.pinned = served.pinned, False
        if old.number < served.current.number:
            if served.previous is not None:
                self._retire(served.previous)
            served.previous = old
        else:  # a rollback, which leaves nothing to return to
            self._retire(old)
        self.revision += 1

    def fail(self, version: DeltaVersion) -> None:
        """It is in ERROR. A failed candidate leaves its predecessor serving and says why."""
        served = self.served.get(version.name)
        if served is not None and served.candidate is version:
            served.candidate, served.error = None, version.error
            served.pinned = served.current.pinned
            self._retire(version)
        elif served is not None and served.previous is version:
            served.previous = None
            self._retire(version)
        self.revision += 1

    def pin(self, name: str, pinned: bool) -> Served:
        served = self.get(name)
        served.pinned = served.current.pinned = pinned
        self.revision += 1
        return served

    def rollback(self, name: str) -> Served:
        """Give up a candidate, or make the previous version one. Raises ConfigError: none."""
        served = self.get(name)
        if served.candidate is not None:
            self._retire(served.candidate)
            served.candidate = None
            served.pinned = served.current.pinned
        elif served.previous is not None:
            served.candidate, served.previous = served.previous, None
            served.pinned = served.current.pinned
            if served.candidate.state is State.READY or served.current.state is State.ERROR:
                self.promote(served)
        else:
            raise ConfigError(
                f"{name!r} has no earlier version to return to: it is at version "
                f"{served.current.number}; register the one that you want"
            )
        self.revision += 1
        return served

    def remove(self, name: str) -> None:
        """No new requests; the versions stay until those bound to them have ended."""
        served = self.get(name)
        del self.served[name]
        for version in served.versions():
            self._retire(version)
        self.revision += 1

    def forget(self, version: DeltaVersion) -> None:
        """A retired version left memory."""
        self.left.remove(version)
        version.state = State.GONE
        self.revision += 1

    def _retire(self, version: DeltaVersion) -> None:
        version.retired, version.pinned, version.wished = True, False, False
        self.left.append(version)

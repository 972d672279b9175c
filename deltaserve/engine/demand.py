"""Who waits for the device, and who comes first."""

from __future__ import annotations

from deltaserve.engine.versions import DeltaVersion, State


class Demand:
    """Versions that shall be loaded: for requests that wait, or because somebody wished it."""

    def __init__(self, starvation_s: float) -> None:
        self.starvation_s = starvation_s
        self._wanted: dict[DeltaVersion, None] = {}
        self._asked: dict[DeltaVersion, None] = {}

    def __bool__(self) -> bool:
        return bool(self._wanted)

    @property
    def num_requests(self) -> int:
        """That wait for what is not in memory."""
        return sum(version.waiting for version in self._wanted)

    def want(self, version: DeltaVersion, now: float) -> None:
        if version.asked is None:
            version.asked = now
        self._wanted[version] = None

    def ask(self, version: DeltaVersion, now: float) -> None:
        """The scheduler would run a request of it now. The order of its calls is kept."""
        self.want(version, now)
        self._asked[version] = None

    def drop(self, version: DeltaVersion) -> None:
        """It is there, or nobody wants it any more."""
        self._wanted.pop(version, None)
        self._asked.pop(version, None)
        version.wished, version.asked = False, None

    def starved(self, version: DeltaVersion, now: float) -> bool:
        return version.asked is not None and now - version.asked >= self.starvation_s

    def any_starved(self, now: float) -> bool:
        """Does one wait too long whose load has not even begun?"""
        return any(v.state is State.REGISTERED and self.starved(v, now) for v in self._wanted)

    def in_order(self, now: float) -> list[DeltaVersion]:
        """Those that starve, then as the scheduler asked for them, then by age."""
        for version in list(self._wanted):
            if not version.waiting and not version.wished:
                self.drop(version)
        place = {version: n for n, version in enumerate(self._asked)}

        def key(version: DeltaVersion) -> tuple[bool, int, float]:
            assert version.asked is not None, "wanted, but never asked for"
            if self.starved(version, now):
                return False, 0, version.asked
            return True, place.get(version, len(place)), version.asked

        return sorted(self._wanted, key=key)

    def next_plan(self) -> None:
        """The scheduler will ask again."""
        self._asked.clear()

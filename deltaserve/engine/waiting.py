"""The requests that wait, in the order in which they should be admitted."""

from __future__ import annotations

import math
from collections import Counter, OrderedDict
from collections.abc import Hashable, Iterator
from heapq import heapify, heappop, heappush

from deltaserve.engine.policy import Flow, Policy
from deltaserve.engine.sequence import Sequence

Lane = OrderedDict[Sequence, None]
"""Requests of one flow for one delta, oldest first."""


class WaitingQueue:
    """Lanes, one for each flow and delta, so that neither order nor removal needs a search.

    The oldest of a lane is *overdue* once it has been that for ``max_wait_s``: it then goes
    before everybody. What counts is not the age of the request: a tenant that floods the
    queue waits for itself, and its thousands of old requests must not push others aside.
    """

    def __init__(self, policy: Policy, max_wait_s: float = math.inf) -> None:
        self.policy = policy
        self.max_wait_s = max_wait_s
        self._bands: dict[int, dict[tuple[str, Hashable], Lane]] = {}
        self._flows: Counter[Flow] = Counter()
        self._count = 0
        self._next_overdue = math.inf

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        """All of them, lane by lane."""
        return (seq for lanes in self._bands.values() for lane in lanes.values() for seq in lane)

    def __contains__(self, seq: Sequence) -> bool:
        band, tenant = self.policy.flow(seq.request)
        return seq in self._bands.get(band, {}).get((tenant, seq.delta_key), ())

    def push(self, seq: Sequence, now: float) -> None:
        flow = band, tenant = self.policy.flow(seq.request)
        if flow not in self._flows:
            self.policy.arrive(flow, self._flows)
        self._flows[flow] += 1
        self._count += 1
        lane = self._bands.setdefault(band, {}).setdefault((tenant, seq.delta_key), OrderedDict())
        _insert_by_age(lane, seq)
        self._start_clock(lane, now)

    def remove(self, seq: Sequence, now: float) -> None:
        flow = band, tenant = self.policy.flow(seq.request)
        lanes, key = self._bands[band], (tenant, seq.delta_key)
        del lanes[key][seq]
        if not seq.aged:  # else it keeps its place before all others, while it runs too
            seq.first_since = None
        if lanes[key]:
            self._start_clock(lanes[key], now)
        else:
            del lanes[key]
        if not lanes:
            del self._bands[band]
        self._flows[flow] -= 1
        self._count -= 1
        if not self._flows[flow]:
            del self._flows[flow]
            self.policy.leave(flow)

    def in_order(self, now: float, loading: set[Hashable]) -> Iterator[Sequence]:
        """Who should be admitted next, again and again; charges in between are respected.

        Nothing may be pushed or removed meanwhile. loading: deltas that the caller found to
        be not in memory; it adds to them, and their lanes are passed over from then on.
        """
        yield from self._overdue(now)
        for band in sorted(self._bands):
            yield from self._band_in_order(band, loading)

    def _band_in_order(self, band: int, loading: set[Hashable]) -> Iterator[Sequence]:
        """Lowest rank first, then the oldest. Ranks in the heap may lag, but never lead."""
        rank = self.policy.rank
        heap = []
        for (tenant, _), lane in self._bands[band].items():
            rest = iter(lane)
            seq = next(rest)
            heap.append((rank((band, tenant)), seq.number, seq, tenant, rest))
        heapify(heap)
        while heap:
            ranked, number, seq, tenant, rest = heappop(heap)
            if seq.delta_key in loading:
                continue
            present = rank((band, tenant))
            if present > ranked:
                heappush(heap, (present, number, seq, tenant, rest))
                continue
            if not seq.aged:  # else it was offered before all others
                yield seq
            following = next(rest, None)
            if following is not None:
                entry = rank((band, tenant)), following.number, following, tenant, rest
                heappush(heap, entry)

    def _overdue(self, now: float) -> list[Sequence]:
        """The lanes' oldest that have waited too long, longest first; marked as such."""
        if now < self._next_overdue:
            return []
        firsts = [next(iter(lane)) for lanes in self._bands.values() for lane in lanes.values()]
        self._next_overdue = min(map(self._due, firsts), default=math.inf)
        overdue = [seq for seq in firsts if self._due(seq) <= now]
        for seq in overdue:
            seq.aged = True
        return sorted(overdue, key=lambda seq: (seq.first_since, seq.number))

    def _start_clock(self, lane: Lane, now: float) -> None:
        first = next(iter(lane))
        if first.first_since is None:
            first.first_since = now
        self._next_overdue = min(self._next_overdue, self._due(first))

    def _due(self, first: Sequence) -> float:
        """When the oldest of a lane goes before everybody; one that did once, does again."""
        assert first.first_since is not None
        return first.first_since + (0.0 if first.aged else self.max_wait_s)


def _insert_by_age(lane: Lane, seq: Sequence) -> None:
    """At the end, as a rule; one that was preempted belongs before those that came later."""
    older = []
    lane[seq] = None
    if len(lane) > 1 and seq.num_cached is not None:  # it ran before
        for other in lane:
            if other.number >= seq.number:
                break
            older.append(other)
        lane.move_to_end(seq, last=False)
        for other in reversed(older):
            lane.move_to_end(other, last=False)

"""Where a budget ends in an order that lies in many places, without bringing it together.

The order is by value, largest first, and by lower id among equals. For each group this finds
the first point beyond what the group may still take, by radix selection: histograms of some
bits at a time, added up over the shards, spell the value and, where equal values straddle the
end, the id. Signed values are mapped to unsigned ones of the same order.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from deltaserve.select.compiled import kernel
from deltaserve.select.state import State

if TYPE_CHECKING:
    from deltaserve.select.backends.base import Session
    from deltaserve.select.graph import AnyShard

LOWEST = np.iinfo(np.int64).min
# Bins of one histogram, over all groups.
MAX_BINS = 1 << 20
MAX_BITS = 16
_SIGN = np.uint64(1 << 63)


@dataclass(frozen=True, eq=False)
class Cut:
    """keys, ids [groups]: a point is before the cut if its value is above the key, or equal
    and its id below. Without points beyond, the key is the lowest number."""

    keys: NDArray[np.int64]
    ids: NDArray[np.int64]

    def later(self, other: Cut) -> Cut:
        """What is before both cuts; a cut of one group holds for all groups of the other."""
        keys = np.broadcast_to(other.keys, self.keys.shape)
        ids = np.broadcast_to(other.ids, self.ids.shape)
        first = (keys > self.keys) | ((keys == self.keys) & (ids < self.ids))
        return Cut(np.where(first, keys, self.keys), np.where(first, ids, self.ids))


@kernel
def _histogram(
    start: int,
    values: NDArray[np.int64],
    status: NDArray[np.uint8],
    group: NDArray[np.int32],
    weight: NDArray[np.int64],
    wanted: int,
    active: NDArray[np.bool_],
    prefix: NDArray[np.uint64],
    tied: NDArray[np.int64],
    by_id: bool,
    last: int,
    shift: int,
    bits: int,
) -> NDArray[np.int64]:
    counts = np.zeros((len(active), 1 << bits), np.int64)
    mask = np.uint64((1 << bits) - 1)
    for i in range(len(values)):
        g = group[i] if len(group) else 0
        if status[i] != wanted or not active[g]:
            continue
        if by_id:
            if values[i] != tied[g]:
                continue
            word = np.uint64(last - (start + i))
        else:
            word = np.uint64(values[i]) ^ _SIGN
        word >>= np.uint64(shift)
        # In two steps: shifting by 64 would shift by nothing.
        if (word >> np.uint64(bits - 1)) >> np.uint64(1) == prefix[g]:
            counts[g, word & mask] += weight[i] if len(weight) else 1
    return counts


@dataclass(frozen=True)
class Question:
    """What a histogram is taken of: an array, over the points of one status.

    grouped: for each group of the instance, else for all points together. weighed: lengths
    are added up instead of points.
    """

    name: str
    status: int
    grouped: bool
    weighed: bool


def histogram(
    shard: AnyShard,
    state: State,
    question: Question,
    active: NDArray[np.bool_],
    prefix: NDArray[np.uint64],
    tied: NDArray[np.int64],
    by_id: bool,
    shift: int,
    bits: int,
) -> NDArray[np.int64]:
    """[groups, 2^bits] totals by the bits above ``shift``, where the higher ones are ``prefix``."""
    rows = slice(shard.start, shard.stop)
    group, length = state.instance.group, state.instance.length
    return _histogram(
        shard.start,
        state.arrays[question.name][rows],
        state.status[rows],
        group[rows] if question.grouped else group[:0],
        length[rows] if question.weighed else length[:0],
        question.status,
        active,
        prefix,
        tied,
        by_id,
        len(state.status) - 1,
        shift,
        bits,
    )


class _Radix:
    """Walks down the bits of the first point beyond ``room``, for all groups at once."""

    def __init__(
        self,
        session: Session,
        question: Question,
        room: NDArray[np.int64],
    ) -> None:
        self.session, self.question = session, question
        self.room = room.copy()
        # Few bins for few points: filling the bins must not cost more than reading the values.
        bits = max(4, session.graph.num_points.bit_length())
        self.bits = min(MAX_BITS, bits, max(1, (MAX_BINS // len(room)).bit_length() - 1))
        # Groups in which something lies beyond the room; the first pass finds out.
        self.active = np.ones(len(room), bool)
        self.keys = np.full(len(room), LOWEST, np.int64)

    def walk(self, width: int, by_id: bool) -> NDArray[np.uint64]:
        prefix = np.zeros(len(self.room), np.uint64)
        high = width
        while high > 0 and self.active.any():
            low = max(0, high - self.bits)
            counts = sum(
                self.session.map(
                    histogram, self.question, self.active, prefix, self.keys,
                    by_id, low, high - low,
                )
            )  # fmt: skip
            upto = np.cumsum(counts[:, ::-1], axis=1)
            self.active &= upto[:, -1] > self.room
            for g in np.flatnonzero(self.active):
                place = int(np.searchsorted(upto[g], self.room[g], side="right"))
                self.room[g] -= upto[g, place - 1] if place else 0
                digit = (1 << (high - low)) - 1 - place
                prefix[g] = (int(prefix[g]) << (high - low)) | digit
            high = low
        return prefix


def first_beyond(
    session: Session,
    name: str,
    room: NDArray[np.int64],
    *,
    status: int,
    grouped: bool = True,
    weighed: bool = False,
    ids: bool = True,
) -> Cut:
    """The first point, in each group, that does not fit into ``room`` [groups] any more.

    Points count 1 each, or their lengths when ``weighed``. With ``ids=False`` equal values are not
    told apart: all are beyond, and the ids are -1.
    """
    radix = _Radix(session, Question(name, status, grouped and len(room) > 1, weighed), room)
    words = radix.walk(64, by_id=False)
    found = radix.active.copy()
    radix.keys[found] = (words[found] ^ _SIGN).view(np.int64)
    places = np.full(len(room), -1, np.int64)
    # With no room left, everything of this value is beyond.
    radix.active &= radix.room > 0
    if ids and radix.active.any():
        straddled = radix.active.copy()
        last = session.graph.num_points - 1
        words = radix.walk(max(1, last.bit_length()), by_id=True)
        places[straddled] = last - words[straddled].astype(np.int64)
    return Cut(radix.keys, places)


def kth_largest(
    session: Session, name: str, k: NDArray[np.int64], *, status: int
) -> NDArray[np.int64]:
    """The k-th largest value (k >= 1) of each group [groups]."""
    return first_beyond(session, name, k - 1, status=status, ids=False).keys

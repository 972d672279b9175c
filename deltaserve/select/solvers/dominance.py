"""Greedy in parallel, exactly: local dominance.

Taking a point only lowers the gains of its neighbours. So a point whose gain (then lower id)
beats all its undecided neighbours will be taken by centralised greedy with exactly that
gain, whatever happens elsewhere, provided that the budget lasts until then. It does if the
budget has room for everything that could come before: all undecided points of higher gain.

A *level* finds how far down the order of gains (which are upper bounds) the budget reaches.
A *sweep* takes all points before that cut that beat their neighbours, and lowers gains; it
repeats until none is left, which leaves room for the next level. Sorted by gain and lower id,
what was taken is in greedy's order. The set equals that of ``greedy``, ties included, for any
number of shards and workers, and the graph is only streamed.

Nothing is taken that must be given back: the cut counts every competitor, so limits on
groups and tokens hold in the same way. (Related: locally dominant matching, Preis, STACS 1999.)
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from deltaserve.select.compiled import kernel
from deltaserve.select.graph import AnyShard
from deltaserve.select.kth import LOWEST, Cut, first_beyond
from deltaserve.select.run import Run, Usage
from deltaserve.select.state import FRESH, UNDECIDED, State, writes
from deltaserve.select.steps import EVERY, begin, refresh, retire


@kernel
def _dominate(
    start: int,
    indptr: NDArray[np.int64],
    indices: NDArray[Any],
    status: NDArray[np.uint8],
    gain: NDArray[np.int64],
    group: NDArray[np.int32],
    keys: NDArray[np.int64],
    ids: NDArray[np.int64],
) -> int:
    taken = 0
    for i in range(len(indptr) - 1):
        v = start + i
        if status[v] > FRESH:
            continue
        mine, g = gain[v], (group[v] if len(group) else 0)
        if mine < keys[g] or (mine == keys[g] and v >= ids[g]):
            continue
        wins = True
        for e in range(indptr[i], indptr[i + 1]):
            w = indices[e]
            # A neighbour that this phase took already still competes.
            if status[w] <= FRESH and (gain[w] > mine or (gain[w] == mine and w < v)):
                wins = False
                break
        if wins:
            status[v] = FRESH
            taken += 1
    return taken


@writes("status")
def dominate(shard: AnyShard, state: State, cut: Cut) -> int:
    """Take every point before the cut that beats its undecided neighbours."""
    return _dominate(
        shard.start,
        shard.indptr,
        shard.indices,
        state.status,
        state.gain,
        state.instance.group,
        cut.keys,
        cut.ids,
    )


def dominance(run: Run) -> None:
    session = run.session
    if run.place["stage"] == "begin":
        session.map(begin)
    else:
        session.map(refresh, EVERY)
    used = run.usage()
    while not run.full(used):
        cut = _level(run, used)
        while taken := sum(session.map(dominate, cut)):
            session.map(refresh, cut.keys)
            run.note("sweep", selected=taken, reach=_in_units(run, cut))
            run.save(stage="dominance")
        used = run.usage()
        session.map(retire, used.taken >= run.limits.caps, run.tokens_left(used))


def _level(run: Run, used: Usage) -> Cut:
    """A cut with correct gains before it.

    Gains are corrected twice as far as the budget reaches by upper bounds: else many points
    before the cut would leave it again, and levels would come to little.
    """
    far = _reach(run, used, 2)
    run.session.map(refresh, far.keys)
    cut = _reach(run, used, 1)
    if np.any(cut.keys < far.keys):
        run.session.map(refresh, cut.keys)
    return cut


def _reach(run: Run, used: Usage, times: int) -> Cut:
    """How far down the order so many times what is left of the budget surely reaches."""
    limits, room = run.limits, times * (run.limits.caps - used.taken)
    cut = first_beyond(run.session, "gain", room, status=UNDECIDED)
    left = times * (limits.k - int(used.taken.sum()))
    if len(room) > 1 and room.sum() > left:
        cut = cut.later(_reach_in_all(run, left))
    if len(limits.length):
        cut = cut.later(_reach_in_all(run, times * run.tokens_left(used), weighed=True))
    return cut


def _reach_in_all(run: Run, left: int, weighed: bool = False) -> Cut:
    room = np.array([left], np.int64)
    return first_beyond(run.session, "gain", room, status=UNDECIDED, grouped=False, weighed=weighed)


def _in_units(run: Run, cut: Cut) -> float | None:
    """The highest key of the cut, in the user's units; None when it is open."""
    key = int(cut.keys.max())
    return None if key == LOWEST else key / run.scale

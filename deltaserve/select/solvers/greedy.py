"""Centralised greedy: the reference (Boether et al. 2025, algorithms 1 and 2).

Takes the point of largest gain, lowers the gains of its neighbours, and so on. The whole
graph is held in memory, in one process; ``dominance`` finds the same set without that.
"""

from __future__ import annotations

import numpy as np

from deltaserve.select.run import Run
from deltaserve.select.solvers.heap import heap_greedy
from deltaserve.select.state import SELECTED, UNDECIDED
from deltaserve.select.steps import EVERY, refresh


def greedy(run: Run) -> None:
    session, limits = run.session, run.limits
    # The heap divides by itself, again after every change of a gain.
    session.map(refresh, EVERY, False)
    used, state = run.usage(), session.state
    instance, graph = state.instance, session.graph.merged()
    ids, keys = heap_greedy(
        graph.indptr,
        graph.indices,
        graph.weights,
        instance.beta,
        state.gain.copy(),
        np.flatnonzero(state.status == UNDECIDED),
        limits.k - int(used.taken.sum()),
        limits.group,
        limits.caps - used.taken,
        limits.length,
        run.tokens_left(used),
        instance.divisor,
    )
    session.write("status", ids, SELECTED)
    session.write("gain", ids, keys)
    run.note("greedy", selected=len(ids))
    run.save(stage="solved")

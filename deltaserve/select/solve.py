"""Selecting points: bounding if wanted, then a solver, then the answer in order."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import numpy as np

from deltaserve.errors import SelectionError
from deltaserve.select.backends.base import Backend
from deltaserve.select.backends.local import Local
from deltaserve.select.budgets import Budget
from deltaserve.select.checkpoint import Checkpoint
from deltaserve.select.objective import objective, value
from deltaserve.select.options import APPROXIMATE, EXACT, PARTITION, Bounding, Partition
from deltaserve.select.problem import Problem, Selection
from deltaserve.select.run import Progress, Run
from deltaserve.select.solvers.bounding import bounding as run_bounding
from deltaserve.select.solvers.dominance import dominance
from deltaserve.select.solvers.greedy import greedy
from deltaserve.select.solvers.partition import partition as run_partition
from deltaserve.select.state import CHOSEN, SELECTED
from deltaserve.select.steps import collect

__all__ = ["Bounding", "Budget", "Partition", "Problem", "Selection", "objective", "solve"]

Solver = Literal["dominance", "greedy", "partition"]
SOLVERS = ("dominance", "greedy", "partition")


def solve(
    problem: Problem,
    *,
    solver: Solver = "dominance",
    bounding: Literal["exact", "approximate"] | Bounding | None = "exact",
    partition: Partition = PARTITION,
    backend: Backend | None = None,
    seed: int = 0,
    checkpoint: Path | None = None,
    scratch: Path | None = None,
    progress: Progress | None = None,
) -> Selection:
    """Select points of a pool. The answer depends on the first four arguments and the seed only.

    Args:
        solver: "dominance" (greedy's set, in parallel), "greedy" (one heap in memory) or
            "partition" (the paper's approximation; see ``partition``).
        bounding: decide what can be decided first. "approximate" is ``Bounding(fraction=0.3)``.
            Budgets without exact counts are not bounded; the log says so.
        backend: where to run; this process unless given.
        checkpoint: file that is replaced after every pass, sweep and round, and from which an
            interrupted selection goes on. It stays when the selection is done.
        scratch: directory for the state of the points, instead of memory.
        progress: called with each entry of the log.

    Raises SelectionError for options that do not fit together, and for a foreign checkpoint.
    """
    if solver not in SOLVERS:
        raise SelectionError(f"solver is {solver!r}, but must be one of {', '.join(SOLVERS)}")
    bounds = _bounding(bounding)
    resumable = None
    if checkpoint:
        resumable = Checkpoint(checkpoint, _identity(problem, solver, bounds, partition, seed))
    backend = backend or Local()
    with backend.open(problem.graph, problem.instance, scratch) as session:
        run = Run(
            session=session,
            limits=problem.limits,
            seed=seed,
            scale=problem.instance.scale,
            num_chosen=0 if problem.chosen is None else int(np.count_nonzero(problem.chosen)),
            checkpoint=resumable,
            progress=progress,
        )
        _start(run, problem)
        if run.place["stage"] in ("begin", "bounding") and bounds:
            _bound(run, bounds)
        if run.place["stage"] != "solved":
            if solver == "partition":
                run_partition(run, partition)
            else:
                (dominance if solver == "dominance" else greedy)(run)
        return _answer(run)


def _bounding(bounding: str | Bounding | None) -> Bounding | None:
    if bounding is None or isinstance(bounding, Bounding):
        return bounding
    known = {"exact": EXACT, "approximate": APPROXIMATE}
    if bounding not in known:
        raise SelectionError(f"bounding is {bounding!r}, but must be exact, approximate or None")
    return known[bounding]


def _identity(problem: Problem, *options: Any) -> str:
    return hashlib.sha256(repr((problem.digest, *options)).encode()).hexdigest()


def _start(run: Run, problem: Problem) -> None:
    """A new state, or that of the checkpoint."""
    session = run.session
    found = run.checkpoint.load() if run.checkpoint else None
    if found is None:
        run.place = {"stage": "begin"}
        if problem.chosen is not None:
            session.write("status", np.flatnonzero(problem.chosen), CHOSEN)
        return
    status, gain, head = found
    session.write("status", slice(None), status)
    session.write("gain", np.flatnonzero(status == SELECTED), gain)
    run.place, run.log = head["place"], head["log"]
    run.note("resume", stage=run.place["stage"])


def _bound(run: Run, options: Bounding) -> None:
    if run.limits.exact:
        run_bounding(run, options)
    else:
        run.note("bounding skipped", reason="the budget does not fix how many points are taken")


def _answer(run: Run) -> Selection:
    session = run.session
    found = session.map(collect)
    ids, keys, gains, included = (np.concatenate(parts) for parts in zip(*found, strict=True))
    order = np.lexsort((ids, -keys, ~included))
    counts = [entry for entry in run.log if entry["verb"] == "bounded"]
    names = ("included", "excluded", "undecided")
    return Selection(
        ids=ids[order],
        gains=gains[order] / run.scale,
        objective=sum(session.map(value)) / run.scale,
        log=run.log,
        bounded={name: counts[-1][name] for name in names} if counts else None,
    )

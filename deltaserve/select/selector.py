"""`Selector`: settings in, `fit` on a pool, attributes out."""

from __future__ import annotations

import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from deltaserve.errors import SelectionError
from deltaserve.select.backends.base import Backend
from deltaserve.select.backends.local import Local
from deltaserve.select.backends.processes import Processes
from deltaserve.select.baselines import baselines, compare, gains_in_order
from deltaserve.select.extras import load_extra
from deltaserve.select.output import write_selection
from deltaserve.select.policies import POLICIES, Choice, Features
from deltaserve.select.pool import Columns, Pool, Progress, no_progress
from deltaserve.select.prepare import Preparation, Prepared
from deltaserve.select.receipt import make_receipt
from deltaserve.select.settings import COLUMN, Settings
from deltaserve.select.solve import Partition, Selection, solve
from deltaserve.select.store import Store


class Selector:
    """Chooses samples from a pool.

        selector = Selector(k=10_000, utility="margin", model="./base").fit("pool.jsonl")
        selector.save("chosen")

    Attributes after `fit`:
        ids_: list of str [k], in order of selection.
        rows_: int64 [k], their places in the pool.
        gains_: float64 [k], what each added to the objective.
        weights_: float64 [k], what to multiply its loss by; 1 unless the policy says otherwise.
        baselines_: dict of int64 [k], the rows of each baseline.
        receipt_: dict for JSON: settings, digests, versions, log, baselines, score, explanation.
        pool_: the Pool.
    """

    def __init__(self, k: int | None = None, **settings: Any) -> None:
        """``settings``: those of `Settings`, which raises SelectionError."""
        self.settings = Settings(k=k, **settings)

    def fit(self, pool: Any, *, progress: Progress = no_progress) -> Selector:
        """Select from a `Pool`, or anything that makes one. Raises SelectionError."""
        settings = self.settings
        if not isinstance(pool, Pool):
            pool = Pool(pool, pool_columns(settings), progress)
        _check_columns(settings, pool)
        started = time.perf_counter()
        with tempfile.TemporaryDirectory(prefix="deltaserve-select-") as folder:
            store = Store(settings.work or Path(folder))
            ready = Preparation(settings, pool, store, progress).run()
            prepared = time.perf_counter()
            if settings.is_policy:
                choice, solved = _choose(settings, ready), None
                gains = gains_in_order(ready.problem, choice.rows)
            else:
                solved = _solve(settings, ready, store, progress)
                choice = Choice(solved.ids, np.ones(len(solved.ids)))
                gains = solved.gains
            solved_at = time.perf_counter()
            others = baselines(
                ready.problem, _lengths(pool)[ready.rows], _strata(ready), settings.seed
            )
            compared = compare(ready.problem, choice.rows, others, _known_greedy(settings, solved))
            seconds = {"preparing": prepared - started, "solving": solved_at - prepared}
            self.receipt_ = make_receipt(settings, ready, choice, solved, compared, seconds)
        self.pool_, self.rows_ = pool, ready.rows[choice.rows]
        self.baselines_ = {name: ready.rows[rows] for name, rows in others.items()}
        self.gains_, self.weights_ = gains, choice.weights
        self.ids_ = pool.ids(self.rows_)
        return self

    def save(self, out: str | Path) -> None:
        """Write ids, samples and receipt into a new directory (see `output`)."""
        write_selection(
            Path(out), self.pool_, self.rows_, self.gains_, self.weights_, self.receipt_
        )


def pool_columns(settings: Settings) -> Columns:
    """The columns to read, the utility's among them."""
    if isinstance(settings.utility, str) and settings.utility.startswith(COLUMN):
        return replace(settings.columns, utility=settings.utility.removeprefix(COLUMN))
    return settings.columns


def _check_columns(settings: Settings, pool: Pool) -> None:
    """A pool that was opened elsewhere must have read what the settings need."""
    wanted = pool_columns(settings)
    for name in ("label", "tokens", "utility"):
        column = getattr(wanted, name)
        if column is not None and getattr(pool.columns, name) != column:
            raise SelectionError(
                f"the pool was opened without its {name} column {column!r}: give Pool the columns"
            )


def _solve(settings: Settings, ready: Prepared, store: Store, progress: Progress) -> Selection:
    problem = ready.problem
    checkpoint = None
    if settings.work is not None:
        how = (settings.solver, settings.bounding, settings.partitions, settings.rounds)
        checkpoint = store.path("progress", problem.digest, *how, settings.gamma, settings.seed)

    taken = 0

    def report(entry: dict[str, Any]) -> None:
        nonlocal taken
        taken += int(entry.get("selected", 0)) + int(entry.get("included", 0))
        progress("selecting", taken, problem.limits.k)

    return solve(
        problem,
        solver=settings.solver,  # type: ignore[arg-type]  # checked by Settings
        bounding=settings.bounding,  # type: ignore[arg-type]
        partition=Partition(settings.partitions, settings.rounds, settings.gamma),
        backend=_backend(settings),
        seed=settings.seed,
        checkpoint=checkpoint,
        progress=report,
    )


def _backend(settings: Settings) -> Backend:
    if settings.backend == "processes":
        return Processes(settings.workers)
    if settings.backend == "ray":
        load_extra("ray")
        from deltaserve.select.backends.rayactors import RayActors

        return RayActors(settings.workers)
    return Local(settings.workers)


def _choose(settings: Settings, ready: Prepared) -> Choice:
    """By a policy, among the candidates that were not selected before."""
    policy, problem = POLICIES[settings.objective], ready.problem
    count = len(ready.rows)
    chosen = np.zeros(count, dtype=bool) if problem.chosen is None else problem.chosen
    free = np.flatnonzero(~chosen)
    rows = ready.rows[free]
    pool = ready.pool
    features = Features(
        len(free),
        labels=None if pool.labels is None else pool.labels.codes[rows],
        triggers=pool.sources.codes[rows],
        used=np.zeros(len(free), dtype=np.int64),
        scores={name: values[rows] for name, values in ready.scores.items()},
        vectors=ready.transform(ready.vectors[free]) if "vectors" in policy.needs else None,
    )
    assert settings.k is not None
    choice = policy.choose(features, settings.k, settings.seed)
    return Choice(free[choice.rows], choice.weights)


def _lengths(pool: Pool) -> np.ndarray:
    return pool.lengths if pool.tokens is None else pool.tokens


def _strata(ready: Prepared) -> np.ndarray | None:
    """Labels, else sources if there are several, else none."""
    pool = ready.pool
    if pool.labels is not None:
        return pool.labels.codes[ready.rows]
    return pool.sources.codes[ready.rows] if len(pool.sources.names) > 1 else None


def _known_greedy(settings: Settings, solved: Selection | None) -> float | None:
    """f of centralised greedy, where the selection is that itself."""
    exact = settings.solver != "partition" and settings.bounding is None
    return solved.objective if solved is not None and exact else None

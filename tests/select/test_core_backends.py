"""The same result everywhere, and after the death of a worker."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaserve.bench.select_instances import random_problem
from deltaserve.errors import SelectionError
from deltaserve.select.backends import processes
from deltaserve.select.backends.base import Backend
from deltaserve.select.backends.local import Local, LocalSession
from deltaserve.select.backends.processes import Processes
from deltaserve.select.backends.rayactors import RayActors, RaySession
from deltaserve.select.budgets import Budget
from deltaserve.select.graph import Graph
from deltaserve.select.options import Bounding, Partition
from deltaserve.select.problem import Problem, Selection
from deltaserve.select.solve import solve
from deltaserve.select.state import written_by
from deltaserve.select.steps import usage

RUNS: dict[str, dict[str, Any]] = {
    "dominance": {"bounding": "exact"},
    "partition": {
        "bounding": Bounding(0.3, "bernoulli"),
        "solver": "partition",
        "partition": Partition(5, 2),
    },
}


def make_problem(shards: int = 5) -> Problem:
    rng = np.random.default_rng(3)
    problem = random_problem(rng, 2000, degree=8, alpha=0.9, k=200, shards=shards)
    groups = rng.integers(0, 2, 2000)
    budget = Budget(groups=groups, counts={0: 150, 1: 50})
    return Problem(problem.graph, problem.utility * np.float32(2), budget, 0.9)


@pytest.fixture(scope="module")
def expected() -> dict[str, Selection]:
    return {name: solve(make_problem(), **options) for name, options in RUNS.items()}


def same(found: Selection, expected: Selection) -> bool:
    return (
        np.array_equal(found.ids, expected.ids)
        and np.array_equal(found.gains, expected.gains)
        and found.objective == expected.objective
        and found.bounded == expected.bounded
    )


class Killing:
    """A progress callback that kills one worker after each of the first entries."""

    def __init__(self, times: int) -> None:
        self.left = times
        self.session: Any = None

    def __call__(self, entry: dict[str, Any]) -> None:
        if self.left:
            self.left -= 1
            self.kill()

    def kill(self) -> None:
        os.kill(self.session.pids[self.left % 2], signal.SIGKILL)


class KillingActors(Killing):
    def kill(self) -> None:
        actors = self.session.actors
        self.session._ray.kill(actors[self.left % len(actors)])


def watched(backend: Backend, killing: Killing) -> Backend:
    """The backend, with its sessions made known to the one who kills."""

    class Watched(Backend):
        def open(self, *arguments: Any) -> Any:
            killing.session = backend.open(*arguments)
            return killing.session

    return Watched()


@pytest.mark.parametrize("on_disk", [True, False])
def test_a_scratch_directory_holds_the_state_and_is_left_empty(
    on_disk: bool, expected: dict[str, Selection], tmp_path: Path
) -> None:
    problem = make_problem()
    if on_disk:
        problem.graph.save(tmp_path / "graph")
        problem = Problem(Graph.open(tmp_path / "graph"), problem.utility, problem.budget, 0.9)
    for name, options in RUNS.items():
        found = solve(problem, backend=Local(2), scratch=tmp_path / "scratch", **options)
        assert same(found, expected[name])
    assert not list((tmp_path / "scratch").iterdir())


class Repeating(LocalSession):
    """Each step is interrupted on each shard, with some of its writes done, and repeated."""

    rng = np.random.default_rng(0)

    def map(self, step: Callable[..., Any], *arguments: Any) -> list[Any]:
        results = []
        for shard in self.graph.shards:
            rows, arrays = slice(shard.start, shard.stop), self.state.arrays
            before = {name: array.copy() for name, array in arrays.items()}
            first = step(shard, self.state, *arguments)
            whole = {name: array.copy() for name, array in arrays.items()}
            for name, array in arrays.items():
                changed = np.flatnonzero(array != before[name])
                assert not len(changed) or name in written_by(step)
                assert np.all((changed >= rows.start) & (changed < rows.stop))
                undone = changed[self.rng.random(len(changed)) < 0.5]
                array[undone] = before[name][undone]
            results.append(step(shard, self.state, *arguments))
            assert repr(results[-1]) == repr(first)
            assert all(np.array_equal(array, whole[name]) for name, array in arrays.items())
        return results


@pytest.mark.parametrize("name", RUNS)
def test_a_step_that_is_interrupted_and_repeated_changes_only_what_it_says(
    name: str, expected: dict[str, Selection]
) -> None:
    class Repeat(Backend):
        def open(self, *arguments: Any) -> Any:
            return Repeating(*arguments, workers=1)

    assert same(solve(make_problem(), backend=Repeat(), **RUNS[name]), expected[name])


def test_processes_find_the_same_and_survive_the_death_of_workers(
    expected: dict[str, Selection], tmp_path: Path
) -> None:
    for name, options in RUNS.items():
        killing = Killing(name == "dominance")
        backend = watched(Processes(2), killing)
        found = solve(make_problem(), backend=backend, progress=killing, **options)
        assert killing.left == 0
        assert same(found, expected[name])


def test_workers_that_keep_dying_are_an_error(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(processes.sys, "executable", "/bin/false")
    with pytest.raises(SelectionError, match="worker processes died 5 times in a row"):
        solve(make_problem(), backend=Processes(1), scratch=tmp_path / "scratch")
    assert not list((tmp_path / "scratch").iterdir())


def test_what_a_step_raises_in_a_process_is_raised_here() -> None:
    problem = make_problem(2)
    with Processes(1).open(problem.graph, problem.instance, None) as session:
        with pytest.raises(TypeError, match="missing 1 required"):
            session.map(usage)
        taken, open_, tokens = session.map(usage, 2)[0]
        assert (taken.sum(), open_.sum(), tokens) == (0, 1000, 0)


def test_backends_without_workers_are_refused() -> None:
    for backend in (Local, Processes, RayActors):
        with pytest.raises(SelectionError, match="number of workers is 0"):
            backend(0)


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A small Ray cluster on this machine."""
    ray = pytest.importorskip("ray")
    ray.init(
        address="local",
        num_cpus=3,
        include_dashboard=False,
        log_to_driver=False,
        object_store_memory=100 << 20,
    )
    yield
    ray.shutdown()


@pytest.mark.usefixtures("cluster")
def test_ray_actors_find_the_same_and_survive_the_death_of_an_actor(
    expected: dict[str, Selection],
) -> None:
    killing = KillingActors(1)
    backend = watched(RayActors(2), killing)
    found = solve(make_problem(), backend=backend, progress=killing, **RUNS["dominance"])
    assert isinstance(killing.session, RaySession)
    assert killing.left == 0
    assert same(found, expected["dominance"])


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_partitions_on_ray_from_a_graph_on_disk_are_the_same(
    expected: dict[str, Selection], tmp_path: Path
) -> None:
    make_problem().graph.save(tmp_path / "graph")
    graph, plain = Graph.open(tmp_path / "graph"), make_problem()
    problem = Problem(graph, plain.utility, plain.budget, 0.9)
    killing = KillingActors(6)
    backend = watched(RayActors(3), killing)
    found = solve(problem, backend=backend, progress=killing, **RUNS["partition"])
    assert killing.left == 0
    assert same(found, expected["partition"])

"""An interrupted selection goes on to the identical set."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from deltaserve.bench.select_instances import random_problem
from deltaserve.errors import SelectionError
from deltaserve.select.checkpoint import Checkpoint
from deltaserve.select.options import Bounding, Partition
from deltaserve.select.problem import Problem
from deltaserve.select.solve import solve

RUNS: dict[str, dict[str, Any]] = {
    "dominance": {"bounding": None},
    "exact bounding": {"bounding": "exact"},
    "approximate bounding": {"bounding": Bounding(0.5), "solver": "greedy"},
    "partition": {"bounding": None, "solver": "partition", "partition": Partition(6, 5)},
}


def make_problem() -> Problem:
    problem = random_problem(np.random.default_rng(5), 400, degree=8, k=60, alpha=0.9, shards=3)
    # Utilities that vary more than similarities, so that bounding needs several passes.
    return Problem(problem.graph, problem.utility * np.float32(3), problem.budget, 0.9)


class StoppedError(Exception):
    pass


@pytest.mark.parametrize("name", RUNS)
def test_a_run_interrupted_after_any_round_comes_to_the_same_set(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem, plain = make_problem(), Checkpoint.save
    expected = solve(problem, **RUNS[name], checkpoint=tmp_path / "whole")
    rounds = 0
    while True:
        rounds += 1
        file, saved = tmp_path / f"after{rounds}", [0]

        def save(self: Checkpoint, *arguments: Any) -> None:
            plain(self, *arguments)
            saved[0] += 1  # noqa: B023
            if saved[0] == rounds:  # noqa: B023
                raise StoppedError

        with monkeypatch.context() as patch:
            patch.setattr(Checkpoint, "save", save)
            try:
                solve(problem, **RUNS[name], checkpoint=file)
                break
            except StoppedError:
                pass
        found = solve(problem, **RUNS[name], checkpoint=file)
        assert np.array_equal(found.ids, expected.ids), rounds
        assert np.array_equal(found.gains, expected.gains)
        assert found.bounded == expected.bounded
        assert "resume" in [entry["verb"] for entry in found.log]
    assert rounds > 3


KILLED = """
import os, signal, sys
from pathlib import Path
from deltaserve.select.checkpoint import Checkpoint
from deltaserve.select.solve import solve
from tests.select.test_core_checkpoint import RUNS, make_problem
plain, saved = Checkpoint.save, []
def save(self, *arguments):
    plain(self, *arguments)
    saved.append(1)
    if len(saved) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
Checkpoint.save = save
solve(make_problem(), **RUNS["exact bounding"], checkpoint=Path(sys.argv[1]))
"""


def test_a_killed_driver_leaves_a_checkpoint_to_go_on_from(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint"
    root = Path(__file__).parents[2]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(file)], cwd=root)
    assert killed.returncode == -signal.SIGKILL
    found = solve(make_problem(), **RUNS["exact bounding"], checkpoint=file)
    expected = solve(make_problem(), **RUNS["exact bounding"])
    assert np.array_equal(found.ids, expected.ids)
    assert found.bounded == expected.bounded
    assert [e["verb"] for e in found.log if e["verb"] != "resume"][:3] == [
        e["verb"] for e in expected.log
    ][:3]


def test_a_checkpoint_is_no_larger_than_the_state(tmp_path: Path) -> None:
    problem = make_problem()
    solve(problem, checkpoint=tmp_path / "checkpoint")
    size = (tmp_path / "checkpoint").stat().st_size
    assert size <= 9 * problem.graph.num_points + 8192


def test_a_checkpoint_of_another_selection_is_refused(tmp_path: Path) -> None:
    problem, file = make_problem(), tmp_path / "checkpoint"
    solve(problem, checkpoint=file)
    with pytest.raises(SelectionError, match="is of another selection"):
        solve(problem, checkpoint=file, seed=1)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(SelectionError, match="is damaged"):
        solve(problem, checkpoint=file)


def test_a_checkpoint_that_cannot_be_written_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SelectionError, match="cannot write the checkpoint"):
        solve(make_problem(), checkpoint=tmp_path / "file" / "checkpoint")

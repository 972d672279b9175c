"""Orders of rows, workers that die, and what stays when an iterator is closed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chi2

from deltaserve.errors import PipelineError
from deltaserve.pipeline import Plan, adapter, open_pipeline
from deltaserve.pipeline.compiling import segments
from deltaserve.pipeline.mixing import Phases, Turns
from deltaserve.pipeline.segments import CHUNK
from tests.pipeline.pipelines import texts, values, write_lines

SIZES = st.lists(st.integers(0, 300), min_size=1, max_size=4)


def numbers(folder: Path, count: int) -> Plan:
    return Plan.from_jsonl(write_lines(folder / f"{count}.jsonl", [{"n": n} for n in range(count)]))


@given(SIZES, st.data(), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_a_mix_gives_every_row_once(sizes: list[int], data: Any, seed: int) -> None:
    weights = data.draw(st.lists(st.floats(0.1, 10), min_size=len(sizes), max_size=len(sizes)))
    order = Phases(weights, sizes, seed, "all")
    given_ = [order[position] for position in range(len(order))]
    assert sorted(given_) == [(part, row) for part, size in enumerate(sizes) for row in range(size)]


@given(SIZES, st.integers(1, 7))
@settings(max_examples=60, deadline=None)
def test_turns_give_every_row_once_in_order(sizes: list[int], block: int) -> None:
    order = Turns(sizes, block)
    given_ = [order[position] for position in range(len(order))]
    assert sorted(given_) == [(part, row) for part, size in enumerate(sizes) for row in range(size)]
    for part in range(len(sizes)):
        rows = [row for which, row in given_ if which == part]
        assert rows == sorted(rows)


def test_a_mix_keeps_its_proportions_everywhere(tmp_path: Path) -> None:
    parts = {numbers(tmp_path, 3000).repeat(): 0.7, numbers(tmp_path, 100).repeat(): 0.3}
    with open_pipeline(Plan.mix(parts, seed=1)) as rows:
        leaves = [rows.next_row().key[0] for _ in range(4096)]
    for start in range(0, 4096, 256):
        assert abs(leaves[start : start + 256].count(0) / 256 - 0.7) < 0.01
    assert leaves[:256] != sorted(leaves[:256])


def test_a_mix_that_ends_with_its_first_part(tmp_path: Path) -> None:
    parts = {numbers(tmp_path, 50): 1.0, numbers(tmp_path, 500): 1.0}
    for plan in (Plan.mix(parts, stop="first"),
                 Plan.mix({p.filter(lambda row: True): w for p, w in parts.items()},
                          stop="first")):  # fmt: skip
        with open_pipeline(plan) as rows:
            leaves = [rows.next_row().key[0] for _ in range(60)]
            leaves += [rows.position for _ in rows]
        assert len(leaves) in range(90, 112)


def test_shuffles_are_permutations_that_change_with_epoch_and_seed(tmp_path: Path) -> None:
    plan = numbers(tmp_path, 1000)
    two = values(plan.shuffle(1).repeat(2), "n")
    one, other = two[:1000], two[1000:]
    assert sorted(one) == sorted(other) == list(range(1000))
    orders = [one, other, values(plan.shuffle(0), "n"), values(plan.shuffle(2), "n")]
    assert len(set(map(tuple, orders))) == 4
    # Displacement of a true permutation: a third of the length.
    for order in orders:
        assert abs(sum(abs(n - at) for at, n in enumerate(order)) / 1000 - 333) < 60


@pytest.mark.parametrize("window", [None, 32])
def test_every_row_comes_at_every_place_as_often(tmp_path: Path, window: int | None) -> None:
    """Chi-square over the places of all rows in many epochs, which are as many seeds: 8 places of
    64 / 8 or 32 / 8 rows. Of permutations it has n - 1 times 8 - 1 degrees of freedom, for n rows
    (of each window)."""
    rows, epochs, places = 64, 400, 8
    size = window or rows
    order = np.array(values(numbers(tmp_path, rows).shuffle(5, window=window).repeat(epochs), "n"))
    where = np.argsort(order.reshape(epochs, rows), axis=1) % size * places // size
    counts = np.stack([(where == place).sum(axis=0) for place in range(places)])
    expected = epochs / places
    statistic = ((counts - expected) ** 2 / expected).sum() * (size - 1) / size
    freedom = (rows // size) * (size - 1) * (places - 1)
    low, high = chi2.ppf([0.001, 0.999], freedom)
    assert low < statistic < high
    # Rows do not stay together either: a neighbour follows as often as any other row.
    follows = (np.diff(order.reshape(epochs, rows), axis=1) == 1).mean()
    assert follows == pytest.approx(1 / size, rel=0.15)


@pytest.mark.parametrize("count", [1, 7, 64, 100])
def test_a_window_moves_rows_within_it(tmp_path: Path, count: int) -> None:
    order = values(numbers(tmp_path, count).shuffle(3, window=10), "n")
    assert sorted(order) == list(range(count))
    assert all(n // 10 == at // 10 for at, n in enumerate(order))


def test_lists_can_be_computed_anywhere(tmp_path: Path) -> None:
    """What remote workers do: any list, in any order, in another copy of the plan."""
    plan = numbers(tmp_path, 300).shuffle(1).repeat(2).named()
    expected = values(plan, "n")
    (one,), (two,) = segments(plan), segments(plan)
    lists = {k: (one if k % 2 else two).run(k).rows for k in reversed(range(one.lists))}
    assert one.lists == -(-600 // CHUNK)
    assert [row.value["n"] for k in range(one.lists) for row in lists[k]] == expected


def test_killed_worker_processes_are_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = Plan.from_jsonl(texts(tmp_path / "a.jsonl", 1500))
    expected = values(plan, "id")
    with open_pipeline(plan, processes=2) as rows:
        found = [next(rows)["id"] for _ in range(200)]
        victim = children()[0]
        os.kill(victim, signal.SIGKILL)
        found += [row["id"] for row in rows]
    assert found == expected
    assert "a worker process died; going on from list" in caplog.text


def deadly(row: dict[str, Any]) -> dict[str, Any]:
    if row["n"] == 150:
        os._exit(1)
    return row


def test_rows_that_kill_every_worker_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adapter, "DEATHS", 1)
    told = r"died 2 times before list . of rows came.*__main__"
    rows = open_pipeline(numbers(tmp_path, 300).map(deadly), processes=1)
    with rows, pytest.raises(PipelineError, match=told):
        list(rows)


def large(row: dict[str, Any]) -> dict[str, Any]:
    """A list of such rows does not fit into a pipe: workers wait in the middle of a message."""
    return {"n": row["n"], "x": np.full(20_000, row["n"], np.int32)}


def test_a_worker_killed_in_the_middle_of_a_message_is_replaced(tmp_path: Path) -> None:
    with open_pipeline(numbers(tmp_path, 1500).map(large), processes=2) as rows:
        found = [next(rows)["n"] for _ in range(100)]
        time.sleep(1)  # now both have made as much as they may
        os.kill(children()[0], signal.SIGKILL)
        began = time.monotonic()
        found += [row["n"] for row in rows]
    assert found == list(range(1500))
    assert time.monotonic() - began < 20


def test_closing_does_not_wait_for_what_workers_have_made(tmp_path: Path) -> None:
    for options in ({"rewrites": False}, {}):
        rows = open_pipeline(numbers(tmp_path, 3000).map(large).batch(8), processes=2, **options)
        for _ in range(20):
            next(rows)
        began = time.monotonic()
        rows.close()
        assert time.monotonic() - began < 3
        assert not children()


def test_workers_end_with_a_parent_that_is_killed(tmp_path: Path) -> None:
    file = tmp_path / "n.jsonl"
    file.write_text("".join(f'{{"n": {at}}}\n' for at in range(3000)))
    program = (
        "from deltaserve.pipeline import Plan, open_pipeline\n"
        "import time, tests.pipeline.test_pipeline_adapter as t\n"
        "if __name__ == '__main__':\n"
        f"    rows = open_pipeline(Plan.from_jsonl({str(file)!r}).map(t.large), processes=2)\n"
        "    [next(rows) for _ in range(200)]\n"
        "    print(*t.children(), flush=True)\n"
        "    time.sleep(60)\n"
    )
    (tmp_path / "program.py").write_text(program)
    parent = subprocess.Popen(
        [sys.executable, tmp_path / "program.py"], stdout=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )  # fmt: skip
    assert parent.stdout is not None
    workers = [psutil.Process(int(each)) for each in parent.stdout.readline().split()]
    assert len(workers) == 2
    parent.kill()
    parent.wait()
    assert not psutil.wait_procs(workers, timeout=20)[1]


def test_no_thread_or_process_stays_after_close(tmp_path: Path) -> None:
    plan = Plan.from_jsonl(texts(tmp_path / "a.jsonl", 500)).batch(3)
    before = Counter(thread.name.split("-")[0] for thread in threading.enumerate())
    for options in ({"threads": 3}, {"processes": 2}):
        with open_pipeline(plan, **options) as rows:
            next(rows)
        assert not children()
        with pytest.raises(PipelineError, match="closed"):
            next(rows)
    for thread in threading.enumerate():
        if thread.name.startswith("grain-prefetch"):
            thread.join(10)
    after = Counter(thread.name.split("-")[0] for thread in threading.enumerate())
    assert after["grain"] <= before["grain"]


def test_an_error_in_a_function_names_operator_and_row(tmp_path: Path) -> None:
    def broken(row: dict[str, Any]) -> dict[str, Any]:
        return {"x": 1 // (row["n"] - 70)}

    plan = numbers(tmp_path, 100).map(broken, name="broken")
    for options in ({}, {"threads": 2}, {"processes": 1}):
        with pytest.raises(PipelineError, match=r"broken, row 70 \(.*jsonl, line 71\): ZeroD"):
            values(plan, "x", **options)


def test_a_function_that_cannot_be_sent_is_named(tmp_path: Path) -> None:
    lock = threading.Lock()

    def locked(row: dict[str, Any]) -> dict[str, Any]:
        with lock:
            return row

    plan = numbers(tmp_path, 100).map(locked, name="locked")
    assert len(values(plan, "n", threads=2)) == 100
    with pytest.raises(PipelineError, match=r"locked: it cannot be sent to worker processes"):
        values(plan, "n", processes=1)


def test_probes_see_every_operator(tmp_path: Path) -> None:
    class Probe:
        def __init__(self) -> None:
            self.calls: Counter[str] = Counter()

        def wrap(self, name: str, call: Any) -> Any:
            def measured(argument: Any) -> Any:
                self.calls[name] += 1
                return call(argument)

            return measured

        def wrap_next(self, name: str, call: Any) -> Any:
            def measured() -> Any:
                self.calls[name] += 1
                return call()

            return measured

        def collect(self) -> Counter[str]:
            found, self.calls = self.calls, Counter()
            return found

        def merge(self, measured: Counter[str]) -> None:
            total.update(measured)

        def __getstate__(self) -> dict[str, Any]:
            return {"calls": Counter()}  # a worker begins with nothing

    plan = numbers(tmp_path, 200).map(dict, name="m").batch(10)
    for processes in (0, 1):
        total: Counter[str] = Counter()
        probe = Probe()
        with open_pipeline(plan, processes=processes, probe=probe) as rows:
            assert len(list(rows)) == 20
        total.update(probe.calls)
        assert total["jsonl"] == total["m"] == 4
        assert total["batch"] == 21


def children() -> list[int]:
    """Worker processes of this one (not the helper that multiprocessing keeps)."""
    import multiprocessing

    return [child.pid for child in multiprocessing.active_children() if child.pid]

"""From how many rows on a delta is dequantised: measured, or what is known where nothing can be."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable

import pytest
import torch

from deltaserve.kernels.delta_matmul import crossover, dispatch
from deltaserve.kernels.delta_matmul.chunks import DENSE_ROWS
from deltaserve.kernels.delta_matmul.crossover import CANDIDATES, dense_rows, first_win

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize(
    ("seconds", "found"),
    [
        ({32: (1, 2), 64: (2, 2), 128: (4, 2)}, 64),  # even is enough
        ({32: (1, 2), 64: (3, 2), 128: (1, 2), 256: (4, 2)}, 256),  # one win below a loss is luck
        ({32: (3, 2), 64: (4, 2)}, 32),
        ({32: (1, 2), 64: (1, 2)}, None),
    ],
)
def test_first_win(seconds: dict[int, tuple[float, float]], found: int | None) -> None:
    assert first_win(seconds) == found


def timed(monkeypatch: pytest.MonkeyPatch, packed: float, dense: float) -> list[str]:
    """A clock that runs the work and answers ``packed`` per chunk of 16 rows, ``dense`` for all."""
    calls: list[str] = []
    rows = itertools.chain.from_iterable((n, n) for n in crossover.CANDIDATES)

    def clock(work: Callable[[], object]) -> float:
        work()
        number = next(rows)
        calls.append(f"{number}")
        return dense if len(calls) % 2 == 0 else packed * -(-number // 16)

    monkeypatch.setattr(crossover, "_best_seconds", clock)
    monkeypatch.setattr(dispatch, "has_kernels", lambda name, base: True)
    return calls


@pytest.mark.parametrize(
    ("packed", "dense", "found"), [(1.0, 3.5, 64), (1.0, 0.1, 16), (1.0, 99.0, 128)]
)
def test_the_first_candidate_from_which_dense_wins(
    packed: float,
    dense: float,
    found: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Both ways are really computed, on a weight of which only the shape is known. Where dense
    never won, twice the last candidate is beyond what was tried."""
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(crossover, "CANDIDATES", (16, 32, 64))
    calls = timed(monkeypatch, packed, dense)
    weight = torch.empty(1, dtype=torch.float32, device=DEVICE).expand(20, 256)
    assert dense_rows(weight) == found
    assert calls == ["16", "16", "32", "32", "64", "64"]
    assert f"from {found} rows of one delta on" in caplog.text


def test_without_kernels_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "_best_seconds", pytest.fail)
    assert dense_rows(torch.empty(20, 256)) == DENSE_ROWS
    assert min(CANDIDATES) <= DENSE_ROWS <= max(CANDIDATES)


def test_the_clock_takes_the_best_and_leaves_the_first_out(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.0, 0.001, 1.0, 9.0, 10.0, 13.0, 20.0, 22.0, 30.0, 35.0, 40.0, 44.0])
    monkeypatch.setattr(crossover.time, "perf_counter", lambda: next(times))
    assert crossover._best_seconds(lambda: None) == 2.0

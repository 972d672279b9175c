"""From how many rows on a delta is unpacked once: found by timing both ways on the layer."""

from __future__ import annotations

import pytest
import torch

from deltaserve.kernels.delta_matmul import GroupedDeltas, crossover
from deltaserve.kernels.delta_matmul.chunks import DENSE_ROWS


@pytest.mark.parametrize(
    ("measured", "first"),
    [
        ({32: (1.0, 2.0), 64: (2.0, 2.0), 128: (4.0, 2.5)}, 64),
        ({32: (1.0, 2.0), 64: (3.0, 2.0), 128: (2.0, 2.5)}, None),
        ({32: (2.0, 1.0), 64: (1.0, 2.0), 128: (4.0, 2.5)}, 128),
    ],
)
def test_only_a_lasting_win_counts(
    measured: dict[int, tuple[float, float]], first: int | None
) -> None:
    assert crossover.first_win(measured) == first


def test_without_kernels_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crossover, "measure", None)
    assert crossover.dense_rows(torch.zeros(64, 64)) == DENSE_ROWS


def test_both_ways_run_and_the_faster_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock is made up: packed takes as long as it has rows, dequantising 50."""
    monkeypatch.setattr(GroupedDeltas, "serves_layer", lambda self: True)
    ran = []

    def clock(work: object) -> float:
        work()  # type: ignore[operator]
        y_TN = work.__defaults__[0]  # type: ignore[attr-defined]
        assert y_TN.abs().sum() == 0  # no input, no correction
        ran.append(work.__name__)  # type: ignore[attr-defined]
        return float(len(y_TN)) if work.__name__ == "packed" else 50.0  # type: ignore[attr-defined]

    monkeypatch.setattr(crossover, "_best_seconds", clock)
    monkeypatch.setattr(crossover, "CANDIDATES", (16, 32, 64))
    assert crossover.dense_rows(torch.zeros(128, 128, dtype=torch.float16)) == 64
    assert ran == ["packed", "dense"] * 3
    monkeypatch.setattr(crossover, "CANDIDATES", (16, 32))
    assert crossover.dense_rows(torch.zeros(128, 128, dtype=torch.float16)) == 64

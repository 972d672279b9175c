"""The share of the lock: the queue model by hand, and real functions."""

from __future__ import annotations

import hashlib

import pytest

from deltaserve.pipeline.tuning.gil import Usage, calibrate, fit, locked_wait


def test_wait_for_the_lock():
    assert locked_wait(0.0, 4) == 0
    assert locked_wait(1.0, 1) == 0
    assert locked_wait(1.0, 4) == pytest.approx(3)  # three others before every call
    assert locked_wait(0.5, 2) == pytest.approx(0.25)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_fit_finds_the_share_that_made_the_wait(share):
    alone = Usage(0.002, 0.0002)  # and a little on the disk
    waited = 0.002 * locked_wait(share, 4, elsewhere=0.1) + 0.0002
    assert fit(alone, Usage(0.002, waited), 4) == pytest.approx(share, abs=0.06)
    waited = 0.002 * locked_wait(share, 4)
    assert fit(Usage(0.002, 0.0), Usage(0.002, waited), 4) == pytest.approx(share, abs=1e-3)


def test_python_holds_it_and_hashing_a_large_block_does_not():
    block = bytes(2_000_000)
    python = calibrate(lambda row: sum(i * i for i in range(row)), [10_000], 0.2)
    native = calibrate(lambda row: hashlib.sha256(row).digest(), [block], 0.2)
    assert python.gil > 0.6
    assert python.waited_s < 0.001
    assert native.gil < 0.3

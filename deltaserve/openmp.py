"""How torch's threads wait for each other."""

from __future__ import annotations

import os

SPINS = "5000"


def spin_briefly() -> None:
    """Call it before torch is loaded; child processes inherit it. What the user has set stays.

    GNU OpenMP lets threads spin for milliseconds at each barrier. Where anything else wants one of
    the cores, the spinning thread keeps the one that it waits for from running: steps then took
    ten times as long. Sleeping at once (OMP_WAIT_POLICY=PASSIVE) costs a step of small matmuls
    nearly twice its time. Tens of microseconds bridge the gaps within a step.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)

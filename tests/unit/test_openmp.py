"""Threads spin briefly, unless the user decided otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from deltaserve.openmp import SPINS, spin_briefly


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_what_the_user_set_stays(
    monkeypatch: pytest.MonkeyPatch, given: dict[str, str], spins: str | None
) -> None:
    monkeypatch.setattr(os, "environ", dict(given))
    spin_briefly()
    assert os.environ.get("GOMP_SPINCOUNT") == spins
    assert os.environ.get("OMP_WAIT_POLICY") == given.get("OMP_WAIT_POLICY")


def test_it_is_set_before_torch_is_loaded() -> None:
    code = (
        "import sys, os, deltaserve.cli.main as m; assert 'torch' not in sys.modules;"
        "sys.argv = ['deltaserve', '--version']\n"
        "try: m.main()\nexcept SystemExit: print(os.environ['GOMP_SPINCOUNT'])"
    )
    env = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split()[-1] == SPINS

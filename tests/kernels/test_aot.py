"""Every shipped kernel compiles for GPUs that are not here: tensor cores, no spills, memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
# Bytes of shared memory that one program may have.
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}


def compiled(which: str, cache: Path) -> list[dict[str, Any]]:
    """One record per configuration, see ``tests.kernels.aot``."""
    # A cache of its own, or what was compiled yesterday would be looked at.
    env = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, "-m", "tests.kernels.aot", which]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def check(records: list[dict[str, Any]]) -> None:
    for record in records:
        assert record["spilled"] == 0, record
        assert record["shared"] <= SHARED_LIMIT[record["capability"]], record
        assert record["tensor_cores"] or not record["product"], record


def test_the_main_configurations_compile(tmp_path: Path) -> None:
    records = compiled("fast", tmp_path)
    check(records)
    assert {record["capability"] for record in records} == set(SHARED_LIMIT)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_all_configurations_compile(tmp_path: Path) -> None:
    records = compiled("all", tmp_path)
    check(records)
    assert {record["dtype"] for record in records} == {"bf16", "fp16"}

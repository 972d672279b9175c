"""The GPU benchmark's program, on a CPU: tiny sizes, and only the libraries that it may need."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from deltaserve.bench.gpu import report, run
from deltaserve.bench.gpu.run import Step
from deltaserve.bench.gpu.shapes import build

ROOT = Path(__file__).parents[2]

# What a machine that only runs the benchmark does not have.
ABSENT = (
    *("fastapi", "starlette", "uvicorn", "pydantic", "openai", "aiohttp", "prometheus_client"),
    *("bitsandbytes", "peft", "accelerate", "datasets", "pyarrow", "ray", "obstore", "grain"),
    *("zstandard", "llguidance", "msgspec", "zmq", "faiss", "numba", "opentelemetry", "hypothesis"),
)
WITHOUT = """
import importlib, sys
absent, modules = sys.argv[1].split(","), sys.argv[2:]
class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in absent:
            return None
        return self.finder.find_spec(name, path, target)
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Without(finder) for finder in sys.meta_path]
for module in modules:
    importlib.import_module(module)
"""


def modules_of_the_run() -> list[str]:
    parts = [f"deltaserve.bench.gpu.{file.stem}" for file in (ROOT / "bench/gpu").glob("*.py")]
    tests = [f"tests.gpu.{file.stem}" for file in (ROOT / "tests/gpu").glob("test_*.py")]
    return [*sorted(parts), "tests.conftest", *sorted(tests)]


def test_nothing_but_torch_and_transformers_is_needed() -> None:
    command = [sys.executable, "-c", WITHOUT, ",".join(ABSENT), *modules_of_the_run()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_parts_run_on_a_cpu_and_fill_the_tables(tmp_path: Path) -> None:
    steps = [Step("decode", 200), Step("serving", 200)]
    assert run.run(tmp_path, steps, 400, smoke=True) == {"decode": "passed", "serving": "passed"}
    found = results(tmp_path, "decode")
    assert all(row["bytes"] > 0 for row in found["rows"])
    assert {row["tenants"] for row in found["rows"]} == {0, 1, 2}
    assert all(row["captured"] for row in found["rows"])
    ways = {row["way"]: row for row in results(tmp_path, "serving")["rows"]}
    for row in ways.values():
        assert row["finished"] == row["requests"] > 0
    assert ways["whole models swapped"]["loads"] > ways["deltas"]["loads"] == 0
    text = "\n".join(report.tables(tmp_path, ["decode", "serving", "cold"]))
    assert "generate processes" in text
    assert "int 1 bit, row" in text


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="would measure")
def test_all_parts_run_on_a_cpu(tmp_path: Path) -> None:
    command = ["bench/gpu/run.sh", str(tmp_path), "--smoke", "--seconds", "1500"]
    env = os.environ | {"PYTHON": sys.executable}
    done = subprocess.run(
        command, cwd=ROOT, env=env, capture_output=True, text=True, check=False, timeout=1600
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert results(tmp_path, "accuracy")["wrong"] == 0
    assert {row["tier"] for row in results(tmp_path, "cold")["rows"]} >= {"host", "disk", "warm"}
    assert len(results(tmp_path, "kernels")["rows"]) == 20


def test_without_a_gpu_nothing_is_measured() -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    command = [sys.executable, "-m", "deltaserve.bench.gpu.kernels"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "there is no CUDA device: only --smoke runs without one\n"


def test_a_part_that_hangs_or_fails_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs = {
        "kernels": "import pathlib, sys; pathlib.Path(sys.argv[2]).write_text('{}')",
        "decode": "import time; time.sleep(600)",
        "cold": "raise SystemExit(3)",
    }
    popen = subprocess.Popen

    def start(command: list[str], **options: Any) -> subprocess.Popen[bytes]:
        name = command[3].rpartition(".")[2]
        return popen([sys.executable, "-c", programs[name], *command[4:]], **options)

    monkeypatch.setattr(run.subprocess, "Popen", start)
    monkeypatch.setattr(run, "LEAST_S", 0.5)
    started = time.monotonic()
    steps = [Step("cold", 20), Step("decode", 1), Step("kernels", 20), Step("serving", 0.1)]
    assert run.run(tmp_path, steps, 60, smoke=True) == {
        "cold": "failed with status 3",
        "decode": "killed at its limit",
        "kernels": "passed",
        "serving": "left out: no time",
    }
    assert time.monotonic() - started < 30
    assert (tmp_path / "gpu_kernels.json").read_text() == "{}"


def test_all_parts_together_fit_the_time_that_a_machine_is_lent_for() -> None:
    assert sum(step.seconds for step in run.STEPS) <= run.BUDGET_S < 10 * 60
    assert {step.name for step in run.STEPS} - {"tests"} <= {
        file.stem for file in (ROOT / "bench/gpu").glob("*.py")
    }
    assert run.STEPS[0].name == "accuracy"


def test_models_that_do_not_fit_are_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(OSError, match=r"\d+ bytes do not fit.*100000 are free.*TMPDIR"):
        build(tmp_path / "models", "tiny", 2, 1)
    assert not list((tmp_path / "models").iterdir())


def results(folder: Path, part: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / f"gpu_{part}.json").read_text())["results"]
    return found

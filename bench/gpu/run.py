"""All parts of the GPU benchmark, one process each: ``bench/gpu/run.sh [RESULTS] [--smoke]``.

Each part has its own limit of time and writes its own JSON file as it goes: one that fails or is
killed loses nothing of the others', and what is left out is said. Tables at the end. The exit
status is 1 if a test, the check of accuracy or a part failed.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from deltaserve.bench.gpu import report

BUDGET_S = 570.0
GRACE_S = 10.0
"""Between telling a part to begin nothing more and killing it."""
LEAST_S = 20.0
"""With less left, a part is not begun."""


@dataclass(frozen=True)
class Step:
    """A part, or the tests. seconds: its limit."""

    name: str
    seconds: float


STEPS = (
    Step("accuracy", 60),
    Step("kernels", 120),
    Step("decode", 100),
    Step("tests", 90),
    Step("cold", 80),
    Step("serving", 115),
)
"""What matters most comes first: whether results are right, then what only a GPU can tell. Together
they fit the budget, so that none is ever left out because the others took all they may."""


def run(results: Path, steps: list[Step], budget: float, *, smoke: bool) -> dict[str, str]:
    """Name -> "passed" or what went wrong."""
    end = time.monotonic() + budget
    outcomes = {}
    with tempfile.TemporaryDirectory(prefix="deltaserve-gpu-") as scratch:
        for step in steps:
            limit = min(step.seconds, end - time.monotonic())
            if limit < LEAST_S:
                outcomes[step.name] = "left out: no time"
                continue
            print(f"\n== {step.name}, at most {limit:.0f} s", flush=True)
            started = time.monotonic()
            outcomes[step.name] = _run_step(step.name, results, Path(scratch), limit, smoke=smoke)
            print(f"== {outcomes[step.name]}, {time.monotonic() - started:.0f} s", flush=True)
    return outcomes


def _run_step(name: str, results: Path, scratch: Path, limit: float, *, smoke: bool) -> str:
    command = [sys.executable, "-u", "-m"]
    if name == "tests":
        command += ["pytest", "-q", "-x", "--maxfail=20", "-m", "gpu", "tests/gpu"]
    else:
        command += [f"deltaserve.bench.gpu.{name}", "--out", str(results / f"gpu_{name}.json")]
        command += ["--seconds", str(limit - GRACE_S), "--models", str(scratch / "models")]
        command += ["--smoke"] * smoke
    env = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if smoke:
        env["TRITON_INTERPRET"] = "1"
    # A group of its own, so that what it has started ends with it.
    process = subprocess.Popen(command, env=env, start_new_session=True)
    try:
        status = process.wait(limit)
    except subprocess.TimeoutExpired:
        return "killed at its limit"
    finally:
        _end(process)
    return "passed" if status == 0 else f"failed with status {status}"


def _end(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("results", type=Path, nargs="?", default=Path("bench/results"))
    parser.add_argument("--smoke", action="store_true", help="try the program on a CPU, tiny")
    parser.add_argument("--seconds", type=float, default=BUDGET_S, help="for all of it")
    parser.add_argument("--only", help="names of parts, by commas")
    args = parser.parse_args()
    only = args.only.split(",") if args.only else [step.name for step in STEPS]
    if unknown := set(only) - {step.name for step in STEPS}:
        parser.error(f"there is no part called {', '.join(sorted(unknown))}")
    args.results.mkdir(parents=True, exist_ok=True)
    steps = [step for step in STEPS if step.name in only]
    outcomes = run(args.results, steps, args.seconds, smoke=args.smoke)
    print()
    for line in report.tables(args.results, [step.name for step in steps]):
        print(line)
    print()
    for name, outcome in outcomes.items():
        print(f"{name}: {outcome}")
    sys.exit(any(outcome != "passed" for outcome in outcomes.values()))


if __name__ == "__main__":
    main()

"""``deltaserve demo`` as a user runs it: a process, a server, an exit code."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from deltaserve.demo.family import Family
from deltaserve.demo.recipe import Recipe
from deltaserve.demo.workspace import DELTAS, RESULTS, SERVER_LOG

MINUTES = 60
URL = re.compile(r"Serving at (http://[^/\s]+)/v1")


def start(*arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "deltaserve", "demo", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.fixture(scope="module")
def demo(family: Family) -> Iterator[subprocess.Popen[str]]:
    """A demo that goes on serving, on the cached family."""
    process = start("--keep-serving")
    yield process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def printed(demo: subprocess.Popen[str]) -> str:
    """What it prints until it serves."""
    assert demo.stdout is not None
    lines: list[str] = []
    for line in demo.stdout:
        lines.append(line)
        if line.startswith("curl"):
            break
    return "".join(lines)


def is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def children(pid: int) -> list[int]:
    tasks = Path(f"/proc/{pid}/task").glob("*/children")
    return [int(child) for task in tasks for child in task.read_text().split()]


# Building the family, where it is missing, takes minutes.
@pytest.mark.timeout(20 * MINUTES)
def test_the_demo_keeps_its_promises(family: Family, printed: str) -> None:
    results = json.loads((family.root / RESULTS).read_text())
    prompts = Recipe().score_prompts
    assert results["failures"] == []
    assert [row["name"] for row in results["models"]] == [m.name for m in family.members]
    for row in results["models"]:
        assert row["base_score"] < 0.2
        assert row["fine_tune_score"] > 0.9
        assert row["served_score"] >= 0.97 * row["fine_tune_score"]
        assert row["full_bytes"] >= 6 * row["resident_bytes"]
        assert row["prompts"] == prompts
        assert row["name"] in printed
    assert {row["kind"] for row in results["models"]} == {"full", "lora"}
    assert results["base"]["prompts"] == prompts * len(family.members)
    assert results["engine"]["mixed_steps"] > 0
    assert results["engine"]["max_models_in_step"] == 1 + len(family.members)
    assert {"train", "compress", "start server", "ask"} <= set(results["phase_seconds"])


@pytest.mark.timeout(20 * MINUTES)
def test_ctrl_c_ends_the_server_too(demo: subprocess.Popen[str], printed: str) -> None:
    found = URL.search(printed)
    assert found is not None
    assert httpx.get(f"{found[1]}/health", trust_env=False).status_code == 200
    (server,) = children(demo.pid)

    demo.send_signal(signal.SIGINT)

    out, err = demo.communicate(timeout=30)
    assert demo.returncode == 0, err
    assert "deltaserve serve" in out
    assert not is_alive(server)
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{found[1]}/health", trust_env=False)


@pytest.mark.timeout(20 * MINUTES)
def test_ctrl_c_while_the_server_starts(family: Family) -> None:
    process = start()
    deadline = time.monotonic() + 60
    while not (found := children(process.pid)) and time.monotonic() < deadline:
        time.sleep(0.02)

    process.send_signal(signal.SIGINT)

    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "deltaserve: interrupted"
    assert found
    assert not any(is_alive(pid) for pid in found)
    left = {path.name for path in family.root.iterdir()}
    assert left <= {m.name for m in family.members} | {
        "base", "family.json", ".lock", DELTAS, SERVER_LOG, RESULTS,
    }  # fmt: skip


def test_a_folder_of_somebody_elses_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    process = start("--dir", str(tmp_path))
    out, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert out == ""
    (line,) = err.splitlines()
    assert "thesis.tex" in line
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]

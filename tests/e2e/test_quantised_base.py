"""``deltaserve serve --quantization``: the demo's fine-tunes on a base of fewer bits, over HTTP."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from deltaserve.demo.family import BASE, Family
from deltaserve.demo.questions import ask, questions_for

pytest.importorskip("bitsandbytes")

PROMPTS = 8
"""For each fine-tune, and as many of its task for the base."""


@pytest.mark.parametrize(("method", "smaller"), [("bitsandbytes", 3.3), ("bitsandbytes-int8", 1.8)])
def test_fine_tunes_answer_on_a_quantised_base(
    family: Family, family_deltas: dict[str, Path], method: str, smaller: float
) -> None:
    command = [sys.executable, "-m", "deltaserve", "serve", str(family.base), "--port", "0"]
    for name, path in family_deltas.items():
        command += ["--delta", f"{name}={path}"]
    command += ["--device", "cpu", "--kv-cache-memory-bytes", str(1 << 24)]
    command += ["--quantization", method, "--served-model-name", BASE]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        lines = iter(server.stdout or ())
        url = next(found[1] for line in lines if (found := re.search(r"at (http://\S+) — ", line)))
        asked = questions_for(family)[: 2 * len(family.members) * PROMPTS]
        session = ask(url, asked, lambda _: None)
        sizes = httpx.get(f"{url}/v1/models", trust_env=False).json()["data"][0]["bytes"]
    finally:
        server.terminate()
        _, errors = server.communicate(timeout=30)
    for member in family.members:
        right = session.score(member.name, member.task)
        assert right > 0.9, f"{member.name}: {right}"
        assert session.score(BASE, member.task) < 0.3
    assert session.engine.max_models_in_step > 2
    assert sizes["full"] > smaller * sizes["resident"]
    assert "WARNING" not in errors
    assert "get_kernel" not in errors

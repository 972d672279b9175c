"""``deltaserve bench`` against ``deltaserve serve``: a real engine, two deltas of a tiny base."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from deltaserve.cli.main import dispatch
from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.demo.tokenizer import build_tokenizer
from tests.families import COMMON, make_fine_tune


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a server."""
    root = tmp_path_factory.mktemp("bench")
    tokenizer = build_tokenizer()
    shape = AutoConfig.for_model("llama", **{**COMMON, "vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(shape, dtype=torch.float32).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for seed, name in enumerate(("alpha", "beta"), start=1):
        make_fine_tune(root / "base", root / name, seed=seed)
        tokenizer.save_pretrained(root / name)
        compress(root / "base", root / name, root / f"{name}.delta", make_plan(codec="raw"))
    content = {
        "base": "base",
        "deltas": {"alpha": "alpha.delta", "beta": "beta.delta"},
        "device": "cpu",
        "kv-cache-memory-bytes": 1 << 24,
    }
    (root / "serve.yaml").write_text(yaml.safe_dump(content))
    return root / "serve.yaml"


WORKLOAD = {
    "models": "deltas",
    "prompt": 40,
    "output": 8,
    "requests": 12,
    "scrape": 0.2,
    "seed": 7,
    "probes": {"rate": 4},
    "slo": {"ttft": 30},
    "tenants": [
        {"name": "open", "arrivals": 8},
        {"name": "closed", "arrivals": {"kind": "closed", "concurrency": 2}},
        {"name": "talk", "arrivals": 8, "requests": 3, "turns": {"count": 2}, "prompt": 20},
    ],
    "thresholds": [
        {"metric": "summary.failed", "max": 0},
        {"metric": "server.series.process_resident_memory_bytes.max", "min": 1e6},
    ],
}


def test_a_whole_load_test_of_a_spawned_server(config, tmp_path, capfd):
    (tmp_path / "w.yaml").write_text(yaml.safe_dump(WORKLOAD))
    out = tmp_path / "r.json"
    command = ["bench", "serve", str(tmp_path / "w.yaml"), "--spawn", str(config)]
    assert dispatch([*command, "--out", str(out)]) == 0, capfd.readouterr()
    result = json.loads(out.read_text())
    assert result["summary"]["completed"] == 12 + 12 + 6
    assert result["summary"]["output_tokens"] == 30 * 8
    assert result["summary"]["slo_attainment"] == 1
    assert set(result["models"]) == {"alpha", "beta"}
    assert result["target"]["version"]
    requests = result["requests"]
    for tenant, tokens in {"open": 40, "closed": 40, "talk": 20}.items():
        rows = zip(requests["tenant"], requests["turn"], requests["probe"], strict=True)
        first = [i for i, row in enumerate(rows) if row == (tenant, 0, False)]
        # The tokenizer knows characters; prompts are whole words of four and a space.
        assert all(abs(requests["prompt_tokens"][i] - tokens) <= 5 for i in first)
    server = result["server"]["series"]
    measured = server["stats.generation_tokens"]["change"]
    assert measured >= result["summary"]["output_tokens"]
    assert result["server"]["mixed_step_share"] > 0
    assert out.with_suffix(".html").read_text().count("<svg") >= 5


def test_chat(config, capfd):
    flags = ["--rate", "20", "--requests", "4", "--set", "prompt=20", "--set", "output=4"]
    chat = ["--set", "endpoint=chat", "--spawn", str(config)]
    assert dispatch(["bench", "serve", *chat, *flags]) == 0
    assert "Total generated tokens:                 16" in capfd.readouterr().out

"""A real server with a tiny model, two tenants and deltas to publish; what its console shows."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import httpx
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from deltaserve.compress.plan import make_plan
from deltaserve.compress.run import compress
from deltaserve.demo.tokenizer import build_tokenizer
from deltaserve.tenancy.keys import digest
from tests.families import COMMON, make_fine_tune

ADMIN, ACME = "admin-secret", "sk-acme"
HOSTILE = "<img src=x onerror=alert(1)>"
TENANTS = {
    "tenants": [
        {"id": "acme", "models": ["acme/*", "base"], "daily_token_budget": 100_000,
         "rpm_limit": 500, "keys": [{"sha256": digest(ACME)}]},
    ]
}  # fmt: skip


def make_files(root: Path) -> Path:
    """A base, and in deltas/ two of it, one of them also under a hostile name."""
    tokenizer = build_tokenizer()
    config = AutoConfig.for_model("llama", **{**COMMON, "vocab_size": len(tokenizer)})
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(root / "base")
    tokenizer.save_pretrained(root / "base")
    for seed, name in enumerate(("one", "two"), start=1):
        make_fine_tune(root / "base", root / name, seed=seed)
        compress(root / "base", root / name, root / "deltas" / name, make_plan(codec="raw"))
    shutil.copytree(root / "deltas/two", root / "deltas" / HOSTILE)
    (root / "tenants.yaml").write_text(json.dumps(TENANTS))
    return root


class ConsoleServer:
    def __init__(self, files: Path, *options: str, keys: bool = True) -> None:
        """``keys``: with tenants and an administrator; else open, as on one's own machine."""
        self.files = files
        self.port = 0
        self.options = list(options)
        self.keys = keys
        self.start()

    def start(self) -> None:
        """Also again, at the same port."""
        command = [sys.executable, "-m", "deltaserve", "serve", str(self.files / "base")]
        command += ["--port", str(self.port), "--device", "cpu", "--no-engine-process"]
        command += ["--kv-cache-memory-bytes", str(1 << 24), *self.options]
        environment = dict(os.environ)
        if self.keys:
            command += ["--tenants", str(self.files / "tenants.yaml")]
            command += ["--state-dir", str(self.files / "state")]
            command += ["--delta-root", str(self.files / "deltas")]
            environment["DELTASERVE_ADMIN_KEY"] = ADMIN
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if ready := re.match(r"DeltaServe ready at (http://\S+:(\d+))", line):
                self.url, self.port = ready[1], int(ready[2])
                return
        raise AssertionError(f"the server ended with {self.process.wait()}")

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.terminate()
            assert self.process.wait(30) == 0

    def ask(self, key: str, method: str, path: str, **more: object) -> httpx.Response:
        headers = {"authorization": f"Bearer {key}"}
        return httpx.request(method, self.url + path, headers=headers, timeout=60, **more)

    def admin(self, method: str, path: str, **more: object) -> dict:
        answer = self.ask(ADMIN, method, path, **more)
        assert answer.status_code < 300, answer.text
        return answer.json()

    def publish(self, name: str, path: str) -> dict:
        return self.admin("POST", "/v1/deltas", json={"name": name, "path": path})

    def generate(self, model: str, tokens: int = 12) -> None:
        body = {"model": model, "prompt": "reverse: abc", "max_tokens": tokens, "ignore_eos": True}
        assert self.ask(ACME, "POST", "/v1/completions", json=body).status_code == 200
